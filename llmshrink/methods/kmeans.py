"""K-means: every weight is one of a few values, which many weights share.

A table of 2^bits values belongs to a stretch of rows. It is the best one for these weights (`clusters.py`), each error
counted by how much an error of its input costs: SqueezeLLM (Kim et al. 2024, arXiv 2306.07629, section 4.1) weighs by
squared gradients, here it is the Hessian of the layer's outputs. With `feedback`, columns are then taken one by one,
and the columns still to come make up for what a code leaves (GPTQ, Frantar et al. 2022, arXiv 2210.17323, with the
nearest value of a table in place of a grid); `refine` moves the tables and the codes to where the outputs of the layer
are nearest to the original's: the tables by conjugate gradients with all codes held, then each code given all others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from llmshrink.forms import Codebook, Layer, Objective, combine
from llmshrink.methods.base import Method, Prepared, Task
from llmshrink.methods.clusters import centroids, middles, nearest
from llmshrink.methods.hessian import DampConfig, Factors, descended, factorised, in_halves, output_error
from llmshrink.statistics import Hessian, NoStatistic, Statistic

FALLBACK = ("kmeans_fallback", "clustered by the weights alone")
OVERHEAD = {1: 0.25, 2: 0.25, 3: 0.2}  # bits a weight that tables may take
USUAL_OVERHEAD = 0.16
STRETCH = 1 << 21  # weights that are clustered at a time, where tables do not span more
STEPS = 1  # of conjugate gradients, in which tables move: more in one pass gain less than another pass (LOG)


class KmeansConfig(DampConfig):
    """Settings of k-means."""

    bits: int = Field(4, ge=1, le=8, description="bits of a code: tables have 2^bits values")
    rows: int | None = Field(
        None,
        description="outputs that share a table; -1: the whole matrix; null: as few as keep the tables below 0.16 bits "
        "a weight (0.2 with 3 bits, 0.25 with fewer)",
    )
    weighting: Literal["hessian", "none"] = Field(
        "hessian",
        description="what an error counts: by the Hessian of the layer's outputs; or all alike: no text, no feedback",
    )
    feedback: bool = Field(True, description="columns to come make up for the error of those that have their codes")
    refine: int = Field(3, ge=0, description="passes over all tables and codes after that")

    def shared(self, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> int:
        """How many outputs of a matrix [out, in] share a table of values of this dtype."""
        out, width = shape
        if self.rows is not None:
            return out if self.rows == -1 else self.rows
        least = 8 * dtype.itemsize * (1 << self.bits) / (OVERHEAD.get(self.bits, USUAL_OVERHEAD) * width)
        return next((rows for rows in range(1, out + 1) if out % rows == 0 and rows >= least), out)


@dataclass
class _Codes:
    """Tables [groups, 2^bits] as they are stored, in float32, and codes [out, in], int64, into them."""

    table: Tensor
    codes: Tensor

    def weight(self) -> Tensor:
        """What they mean, float32 [out, in]."""
        groups = len(self.table)
        return self.table.gather(1, self.codes.view(groups, -1)).view(self.codes.shape)


class Kmeans(Method[KmeansConfig]):
    """K-means by sensitivity, with feedback."""

    task: ClassVar[Task] = "cluster"
    needs = Hessian
    Config = KmeansConfig

    @property
    def statistic(self) -> type[Statistic]:
        """The Hessian, where errors are weighed."""
        return NoStatistic if self.config.weighting == "none" else Hessian

    def check(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix [out, in] of this shape cannot be clustered so, or None."""
        rows, values = self.config.rows, 1 << self.config.bits
        if rows is not None and rows != -1 and (rows < 1 or shape[0] % rows):
            return f"rows {rows} does not divide its {shape[0]} outputs"
        weights = self.config.shared(shape) * shape[1]
        return None if weights > values else f"a table of {values} values would stand for {weights} weights"

    def prepare(self, statistic: Statistic) -> Prepared:
        """Factorise the Hessian once for all linears fed by the same tensor."""
        if not isinstance(statistic, Hessian):
            return Prepared()
        return factorised(statistic, self.config, act_order=True, otherwise=FALLBACK, dead=FALLBACK[1])

    @property
    def alone(self) -> Kmeans:
        """The same by weights alone."""
        return Kmeans(self.config.model_copy(update={"weighting": "none"}), self.scales)

    @property
    def in_stretches(self) -> bool:
        """Whether a large matrix is taken a stretch of rows at a time: those that share a table stay together."""
        return self.config.rows != -1

    def scratch(self, shape: tuple[int, int]) -> int:
        """Bytes that `compress` holds of a stretch of a matrix [out, in]."""
        together = self.config.shared(shape) * shape[1]  # weights under one table
        return super().scratch((1, max(together, min(STRETCH, shape[0] * shape[1]))))

    def compress(self, weight: Tensor, prepared: Prepared) -> Layer:
        """Cluster one matrix [out, in]."""
        rows = self.config.shared((len(weight), weight.shape[1]), weight.dtype)
        size = max(1, STRETCH // (rows * weight.shape[1])) * rows
        found = [self._stretch(part, prepared, rows) for part in torch.split(weight, size)]
        known = [layer.objective for layer in found if layer.objective is not None]
        joined = Objective(torch.cat([o.own for o in known]), torch.cat([o.baseline for o in known])) if known else None
        return replace(found[0], weight=combine([layer.weight for layer in found], torch.cat), objective=joined)

    def _stretch(self, weight: Tensor, prepared: Prepared, rows: int) -> Layer:
        W = weight.float()
        factors = prepared if isinstance(prepared, Factors) else None
        first = _with_zeros(W, self._nearest(W, rows, self._importance(factors), weight.dtype))
        if factors is None:
            return Layer(self._form(first, weight.dtype))
        found = first
        if self.config.feedback:
            found = _swept(W, found.table, factors)
            for _ in range(self.config.refine):
                found = _moved(W, _refitted(W, found, factors, weight.dtype), factors)
        return self._better(W, first, _with_zeros(W, found), factors.H, weight.dtype)

    def _importance(self, factors: Factors | None) -> Tensor | None:
        """What an error of each input counts [in]: with feedback what is left of it once others make up for it."""
        if factors is None:
            return None
        return factors.importance if self.config.feedback else factors.H.diagonal()

    def _nearest(self, W: Tensor, rows: int, importance: Tensor | None, dtype: torch.dtype) -> _Codes:
        """The best tables, and the nearest of their values."""
        values = W.reshape(len(W) // rows, -1)
        weights = None if importance is None else importance.repeat(rows).expand_as(values)
        table = centroids(values, weights, 1 << self.config.bits).to(dtype).float()
        return _Codes(table, nearest(values, table).view(W.shape))

    def _better(self, W: Tensor, one: _Codes, other: _Codes, H: Tensor, dtype: torch.dtype) -> Layer:
        """Of two results, for each table the one with the smaller output error; `one` is the baseline."""
        baseline, own = (output_error(W, codes.weight(), H) for codes in (one, other))
        groups = len(one.table)
        better = (own.view(groups, -1).sum(1) <= baseline.view(groups, -1).sum(1))[:, None]
        by_row = better.repeat_interleave(len(W) // groups, 0)
        table = torch.where(better, other.table, one.table)
        codes = torch.where(by_row, other.codes, one.codes)
        chosen = torch.where(by_row[:, 0], own, baseline)
        return Layer(self._form(_Codes(table, codes), dtype), Objective(chosen, baseline))

    def _form(self, found: _Codes, dtype: torch.dtype) -> Codebook:
        return Codebook(found.codes.to(torch.uint8), found.table.to(dtype), self.config.bits)

    def form(self, shape: tuple[int, int], dtype: torch.dtype) -> Layer:
        """The same structure on the `meta` device."""
        codes = torch.empty(shape, dtype=torch.uint8, device="meta")
        groups = shape[0] // self.config.shared(shape, dtype)
        return Layer(
            Codebook(codes, torch.empty(groups, 1 << self.config.bits, dtype=dtype, device="meta"), self.config.bits)
        )


def _with_zeros(W: Tensor, found: _Codes) -> _Codes:
    """The same with rows of zeros as zeros: the value next to zero becomes it.

    Of a table of tokens it is the one for padding, which is often the first of every text too: a norm makes any small
    state that it leaves as large as all others.
    """
    groups, empty = len(found.table), W.count_nonzero(1) == 0
    if not empty.any():
        return found
    table, least = found.table.clone(), found.table.abs().argmin(1)
    there = empty.view(groups, -1).any(1).nonzero()[:, 0]
    table[there, least[there]] = 0
    return _Codes(table, torch.where(empty[:, None], least.repeat_interleave(len(W) // groups)[:, None], found.codes))


def _swept(W: Tensor, table: Tensor, factors: Factors) -> _Codes:
    """Codes [out, in] taken one column after another, each error spread over the columns to come."""
    order, spread = factors.order, factors.spread
    rest = W.T[order]  # once a column has its codes, the error it leaves
    codes = torch.empty(rest.shape, dtype=torch.long, device=W.device)
    middle = middles(table)
    groups = len(table)

    def one_by_one(start: int, stop: int) -> None:
        block, errors = rest[start:stop], torch.empty_like(rest[start:stop])
        for i, error in zip(range(start, stop), errors.unbind(), strict=True):
            column = rest[i].view(groups, -1)
            code = torch.searchsorted(middle, column)
            codes[i] = code.flatten()
            torch.sub(rest[i], table.gather(1, code).flatten(), out=error)
            block.addr_(spread[i, start:stop], error, alpha=-1)
        block.copy_(errors)

    def pass_on(start: int, middle_: int, stop: int) -> None:
        rest[middle_:stop].addmm_(spread[start:middle_, middle_:stop].T, rest[start:middle_], alpha=-1)

    in_halves(0, len(order), one_by_one, pass_on)
    return _Codes(table, torch.empty_like(codes).index_copy_(0, order, codes).T.contiguous())


def _refitted(W: Tensor, found: _Codes, factors: Factors, dtype: torch.dtype) -> _Codes:
    """The same codes under tables that bring the outputs nearest to those of W, by conjugate gradients.

    The objective is a parabola in the values of a table: with P what puts a value where its code is, and H the damped
    Hessian, P^T H P t = P^T H w; preconditioned by the diagonals of H added up over each value's weights.
    """
    groups, count = found.table.shape
    codes = found.codes.view(groups, -1)

    def curved(E: Tensor) -> Tensor:
        return (E @ factors.H).add_(E, alpha=factors.damp)

    def added(values: Tensor) -> Tensor:
        return torch.zeros(groups, count, device=W.device).scatter_add_(1, codes, values.reshape(groups, -1))

    scale = added((factors.H.diagonal() + factors.damp).expand_as(W)).clamp_(min=torch.finfo(torch.float32).tiny)
    residual = added(curved(W - found.weight()))
    table = descended(
        found.table.clone(), residual, lambda t: added(curved(_Codes(t, found.codes).weight())), scale, STEPS
    )
    stored = table.to(dtype).float()
    order = stored.argsort(dim=1, stable=True)  # values may have passed each other
    return _Codes(stored.gather(1, order), order.argsort(1).gather(1, codes).view(W.shape))


def _moved(W: Tensor, found: _Codes, factors: Factors) -> _Codes:
    """One pass of exact coordinate descent over all codes: each moves to its best value given all the others."""
    H, groups = factors.H, len(found.table)
    weights = found.weight().T.clone(memory_format=torch.contiguous_format)
    gradient = H @ (weights - W.T)
    gradient.add_(weights - W.T, alpha=factors.damp)
    codes = found.codes.T.clone(memory_format=torch.contiguous_format)
    change = torch.empty_like(weights)
    middle = middles(found.table)
    stiffness = H.diagonal() + factors.damp

    def one_by_one(start: int, stop: int) -> None:
        block, rows = gradient[start:stop], H[start:stop, start:stop]
        for i in range(start, stop):
            wanted = (weights[i] - gradient[i] / stiffness[i]).view(groups, -1)
            code = torch.searchsorted(middle, wanted)
            codes[i] = code.flatten()
            torch.sub(found.table.gather(1, code).flatten(), weights[i], out=change[i])
            block.addr_(rows[i - start], change[i])

    def pass_on(start: int, middle_: int, stop: int) -> None:
        gradient[middle_:stop].addmm_(H[middle_:stop, start:middle_], change[start:middle_])

    in_halves(0, len(weights), one_by_one, pass_on)
    return _Codes(found.table, codes.T.contiguous())


METHOD = Kmeans
