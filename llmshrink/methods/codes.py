"""Codes under tables of values, and how both move to where the outputs of a layer are nearest to the original's.

A code stands for one value, or for a vector of `dim` adjacent inputs (GPTVQ, van Baalen et al. 2024, arXiv 2402.15319).
`swept` takes columns one by one, and those still to come make up for what a code leaves (GPTQ, Frantar et al. 2022,
arXiv 2210.17323, with the nearest of a table in place of a grid); `refitted` moves the tables with all codes held,
`rescaled` the scales of rows, and `moved` each code given all others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmshrink.methods import clusters, vectors
from llmshrink.methods.hessian import Factors, descended, in_halves

AHEAD = 1 << 22  # numbers of tables that are seen under all roots ahead
STORED = torch.bfloat16  # of what lies beside codes
STEPS = 1  # of conjugate gradients, in which tables move: more in one pass gain less than another pass (LOG)


@dataclass
class Codes:
    """Tables and scales as they are stored, in float32, and codes into the tables.

    Rows i * out / groups to (i + 1) * out / groups share the table i.
    """

    table: Tensor  # [groups, count, dim]; with dim 1 values rise
    scale: Tensor  # [out, 1], of ones where rows have none
    codes: Tensor  # int64 [out, in / dim]
    free: Tensor | None = None  # bool [out, in], true for weights that have a number beside their code (dim 1 only)
    apart: Tensor | None = None  # float32 [out, in], these numbers as they are stored; of others 0

    def units(self) -> Tensor:
        """What they mean in units of the scales, float32 [out, in]."""
        groups, _, dim = self.table.shape
        index = self.codes.view(groups, -1, 1).expand(-1, -1, dim)
        return self.table.gather(1, index).view(len(self.codes), -1)

    def weight(self) -> Tensor:
        """What they mean, float32 [out, in]."""
        weight = self.units().mul_(self.scale)
        return weight if self.apart is None else weight.add_(self.apart)


def nearest(units: Tensor, table: Tensor, weights: Tensor | None = None) -> Tensor:
    """The index of the nearest of each table [groups, count, dim] for `units` [groups, n, dim]: int64 [groups, n].

    `weights`, of the same shape as `units`, say what the square of an error counts; None: all equal.
    """
    if table.shape[2] == 1:
        return clusters.nearest(units[..., 0], table[..., 0])
    masses = [None] * len(units) if weights is None else weights
    return torch.stack([vectors.nearest(x, mass, one)[0] for x, mass, one in zip(units, masses, table, strict=True)])


class _Search:
    """Which entry of each table is the nearest to a column, or to adjacent ones, when errors weigh as roots say."""

    def __init__(self, found: Codes, roots: Tensor, order: Tensor | None = None) -> None:
        """Begin.

        Args:
            found: tables and scales, and which weights are free.
            roots: [vectors, dim, dim]: of vector i the error e [dim] costs |roots[i] e|^2.
            order: int64 [in], in which the inputs follow each other; None: their own.
        """
        self._table, self._scale, self._roots = found.table, found.scale.T, roots
        free = found.free if order is None or found.free is None else found.free[:, order]
        self._free = None if free is None else free.T.contiguous()
        self.apart = None if self._free is None else torch.zeros(self._free.shape, device=roots.device)  # [in, out]
        groups, _, dim = found.table.shape
        if dim == 1:
            self._middle = clusters.middles(found.table[..., 0])
            return
        small = found.table.numel() * len(roots) <= AHEAD
        self._values = self._seen(roots) if small else None
        self._wanted = torch.ones(groups, len(found.scale) // groups, dim + 1, device=roots.device)

    def nearest(self, vector: int, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [out] of the entries nearest to `wanted` [dim, out], and what they and numbers beside them mean."""
        code, meant = self._entries(vector, wanted)
        if self._free is not None and self.apart is not None:
            self.apart[vector] = beside(wanted[0] - meant[0], self._free[vector])
            meant = meant + self.apart[vector]
        return code, meant

    def _entries(self, vector: int, wanted: Tensor) -> tuple[Tensor, Tensor]:
        (groups, _, dim), units = self._table.shape, wanted / self._scale
        if dim == 1:
            code = torch.searchsorted(self._middle, units.view(groups, -1))
            return code.flatten(), self._table[..., 0].gather(1, code).view(1, -1).mul_(self._scale)
        self._wanted[..., :dim] = (self._roots[vector] @ units).view(dim, groups, -1).permute(1, 2, 0)
        known = self._seen(self._roots[vector][None])[0] if self._values is None else self._values[vector]
        code = vectors.smallest(self._wanted @ known)
        meant = self._table.gather(1, code[..., None].expand(-1, -1, dim)).view(-1, dim).T
        return code.flatten(), meant * self._scale

    def _seen(self, roots: Tensor) -> Tensor:
        """Of the entries what a distance to them takes, under each of the roots: [vectors, groups, dim + 1, count]."""
        values = torch.einsum("gkd,ved->vgek", self._table, roots)
        return torch.cat([-2 * values, values.square().sum(2, keepdim=True)], 2)


def swept(W: Tensor, start: Codes, factors: Factors) -> Codes:
    """Codes under the tables of `start`, one column after another, each error spread over the columns to come.

    Args:
        W: float32 [out, in].
        start: tables and scales.
        factors: of the Hessian; their order keeps the inputs of a vector together.
    """
    spread, dim, order = factors.spread, start.table.shape[2], factors.order
    if factors.adjacent % dim:
        raise ValueError(f"codes of {dim} inputs, and the order keeps {factors.adjacent} together")
    rest = W.T[order]  # once a column has its codes, the error it leaves
    codes = torch.empty(len(order) // dim, len(W), dtype=torch.long, device=W.device)
    within, roots = _within(spread, factors.pivots, dim)
    search = _Search(start, roots, order)

    def one_by_one(first: int, stop: int) -> None:
        block, errors = rest[first:stop], torch.empty_like(rest[first:stop])
        for i in range(first, stop, dim):
            own = rest[i : i + dim]
            codes[i // dim], meant = search.nearest(i // dim, own)
            error = errors[i - first : i - first + dim]
            torch.mm(within[i // dim], own - meant, out=error)
            block.addmm_(spread[i : i + dim, first:stop].T, error, alpha=-1)
        block.copy_(errors)

    def pass_on(first: int, middle: int, stop: int) -> None:
        rest[middle:stop].addmm_(spread[first:middle, middle:stop].T, rest[first:middle], alpha=-1)

    in_halves(0, len(order), one_by_one, pass_on)
    found = torch.empty_like(codes).index_copy_(0, order[::dim] // dim, codes)
    apart = search.apart
    if apart is not None:
        apart = torch.empty_like(apart).index_copy_(0, order, apart).T.contiguous()
    return replace(start, codes=found.T.contiguous(), apart=apart)


def beside(rest: Tensor, free: Tensor) -> Tensor:
    """What is stored beside codes that leave this rest: as much where weights are free, else nothing."""
    return torch.where(free, rest.to(STORED).float(), 0)


def _within(spread: Tensor, pivots: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """For each vector, what turns its differences into the errors its columns leave, and the root of what these cost.

    The second column of a vector makes up for the error of the first, as any later column does: the differences are
    S^T e, for S the part of the spread between its columns, and the cost is the sum of pivot * e^2.

    Returns:
        Both [vectors, dim, dim], lower triangular.
    """
    vectors = len(pivots) // dim
    if dim == 1:
        return torch.ones(vectors, 1, 1, device=pivots.device), pivots.sqrt().view(-1, 1, 1)
    blocks = spread.view(vectors, dim, vectors, dim).diagonal(dim1=0, dim2=2).permute(2, 0, 1).triu(1)
    unit = torch.eye(dim, device=pivots.device)
    inverse = torch.linalg.solve_triangular((blocks + unit).mT.contiguous(), unit.expand(vectors, -1, -1), upper=False)
    return inverse, pivots.sqrt().view(vectors, dim, 1) * inverse


def moved(W: Tensor, found: Codes, factors: Factors) -> Codes:
    """One pass of exact coordinate descent over all codes: each moves to its best given all the others."""
    H, dim = factors.H, found.table.shape[2]
    weights = found.weight().T.clone(memory_format=torch.contiguous_format)
    gradient = H @ (weights - W.T)
    gradient.add_(weights - W.T, alpha=factors.damp)
    codes = found.codes.T.clone(memory_format=torch.contiguous_format)
    change = torch.empty_like(weights)
    inverse, roots = _curvature(H, factors.damp, dim)
    search = _Search(found, roots)

    def one_by_one(first: int, stop: int) -> None:
        block, columns = gradient[first:stop], H[first:stop]
        for i in range(first, stop, dim):
            part, vector = slice(i, i + dim), i // dim
            wanted = torch.addmm(weights[part], inverse[vector], gradient[part], alpha=-1)
            codes[vector], meant = search.nearest(vector, wanted)
            torch.sub(meant, weights[part], out=change[part])
            block.addmm_(columns[:, part], change[part])

    def pass_on(first: int, middle: int, stop: int) -> None:
        gradient[middle:stop].addmm_(H[middle:stop, first:middle], change[first:middle])

    in_halves(0, len(weights), one_by_one, pass_on)
    apart = None if search.apart is None else search.apart.T.contiguous()
    return replace(found, codes=codes.T.contiguous(), apart=apart)


def _curvature(H: Tensor, damp: float, dim: int) -> tuple[Tensor, Tensor]:
    """The inverse of the damped Hessian of each vector's inputs, and its root, both [vectors, dim, dim]."""
    vectors = len(H) // dim
    blocks = H.view(vectors, dim, vectors, dim).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()
    blocks.diagonal(dim1=1, dim2=2).add_(damp)
    if dim == 1:
        return blocks.reciprocal(), blocks.sqrt()
    root = torch.linalg.cholesky(blocks)
    return torch.cholesky_inverse(root), root.mT


def refitted(W: Tensor, found: Codes, factors: Factors, dtype: torch.dtype) -> Codes:
    """The same codes under tables that bring the outputs nearest to those of W, by conjugate gradients.

    The objective is a parabola in the values of a table: with P what puts a value where its code is, in units of the
    row's scale, and H the damped Hessian, P^T H P t = P^T H w; preconditioned by the diagonals of H added up over each
    value's weights.
    """
    groups, count, dim = found.table.shape
    index = (found.codes.view(groups, -1, 1) * dim + torch.arange(dim, device=W.device)).view(groups, -1)

    def added(values: Tensor) -> Tensor:
        return torch.zeros(groups, count * dim, device=W.device).scatter_add_(1, index, values.reshape(groups, -1))

    def curved(table: Tensor) -> Tensor:
        change = replace(found, table=table.view(groups, count, dim), apart=None).weight()
        return added(_curved(change, factors).mul_(found.scale))

    diagonal = (factors.H.diagonal() + factors.damp) * found.scale.square()
    scale = added(diagonal).clamp_(min=torch.finfo(torch.float32).tiny)
    residual = added(_curved(W - found.weight(), factors).mul_(found.scale))
    table = descended(found.table.reshape(groups, -1).clone(), residual, curved, scale, STEPS)
    return in_order(replace(found, table=table.view(groups, count, dim).to(dtype).float()))


def in_order(found: Codes) -> Codes:
    """The same with values in rising order, where a table is of single ones: they may have passed each other."""
    groups, _, dim = found.table.shape
    if dim > 1:
        return found
    order = found.table[..., 0].argsort(dim=1, stable=True)
    codes = order.argsort(1).gather(1, found.codes.view(groups, -1)).view(found.codes.shape)
    return replace(found, table=found.table.gather(1, order[..., None]), codes=codes)


def rescaled(W: Tensor, found: Codes, factors: Factors, dtype: torch.dtype) -> Codes:
    """The same codes and tables under scales that bring each row's outputs nearest to those of W, by least squares."""
    units = found.units()
    seen = _curved(units, factors)
    W = W if found.apart is None else W - found.apart
    scale = (seen * W).sum(1, keepdim=True) / (seen * units).sum(1, keepdim=True)
    usable = (scale > 0) & scale.isfinite()
    return replace(found, scale=torch.where(usable, scale, found.scale).to(dtype).float())


def _curved(E: Tensor, factors: Factors) -> Tensor:
    """E [out, in] times the damped Hessian."""
    return (E @ factors.H).add_(E, alpha=factors.damp)
