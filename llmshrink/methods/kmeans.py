"""K-means: every weight is one of a few values, which many weights share.

A table belongs to a stretch of rows, which are counted in scales of their own; its entries are values, or vectors of
adjacent inputs. It is the best one for these weights (`clusters.py`, `vectors.py`), each error counted by how much an
error of its input costs: SqueezeLLM (Kim et al. 2024, arXiv 2306.07629, section 4.1) weighs by squared gradients, here
it is the Hessian of the layer's outputs, in which tokens may weigh by their squared gradients (`weighting: gradient`,
`engine/slopes.py`). With `feedback` columns make up for the codes of others, and `refine` moves tables, scales and
codes to where the outputs of the layer are nearest to the original's (`codes.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from llmshrink.forms import Codebook, Form, Layer, Objective, Scattered, Sum, stacked
from llmshrink.methods import clusters, vectors
from llmshrink.methods.base import Method, Prepared, Task
from llmshrink.methods.codes import STORED, Codes, beside, moved, nearest, refitted, rescaled, swept
from llmshrink.methods.hessian import DampConfig, Factors, factorised, output_error
from llmshrink.statistics import Fisher, Hessian, NoStatistic, Statistic

FALLBACK = ("kmeans_fallback", "clustered by the weights alone")
OVERHEAD = {1: 0.25, 2: 0.25, 3: 0.2}  # bits a weight that tables may take where rows have no scales
USUAL_OVERHEAD = 0.16
SCALED = 64  # inputs from which rows have scales: 0.25 bits a weight there, and less the more there are
VECTORS = 0.1  # bits a weight that a table may take for its entries to be vectors, unless they are asked for
STRETCH = 1 << 21  # weights that are clustered at a time, where tables do not span more
LONGEST = 8  # bits of a code
SCALE, UNITS = torch.bfloat16, torch.float16  # of scales, which are rounded before the rest is fitted; of tables there


@dataclass(frozen=True)
class Sharing:
    """How the weights of a matrix share entries of tables."""

    dim: int  # adjacent inputs that have one code
    rows: int  # outputs that have one table
    scaled: bool  # whether each of them has a scale
    values: torch.dtype  # of the tables


class KmeansConfig(DampConfig):
    """Settings of k-means."""

    bits: int = Field(4, ge=1, le=LONGEST, description="bits a weight: tables have 2^(bits * dim) entries")
    dim: Literal[1, 2, 4] | None = Field(
        None,
        description="adjacent inputs that have one code, so that entries are vectors; null: as many as leave codes of "
        "8 bits and a table below 0.1 bits a weight",
    )
    scales: bool | None = Field(
        None,
        description="rows are counted in scales of their own, so that many can share a table; null: from 64 inputs on",
    )
    rows: int | None = Field(
        None,
        description="outputs that share a table; -1: the whole matrix; null: with scales as many as are clustered at a "
        "time, without as few as keep tables below 0.16 bits a weight (0.2 with 3 bits, 0.25 with fewer)",
    )
    outliers: float = Field(
        0.0,
        ge=0,
        le=0.05,
        description="share of the weights, the largest of their rows, that have a number beside their code: 32 bits",
    )
    weighting: Literal["hessian", "gradient", "none"] = Field(
        "hessian",
        description="what an error counts: hessian: by what it changes in the layer's outputs; gradient: the same, its "
        "tokens weighed by squared gradients, found in a pass of its own; none: all alike, no text, no feedback",
    )
    feedback: bool = Field(True, description="columns to come make up for the error of those that have their codes")
    refine: int = Field(3, ge=0, description="passes over all tables, scales and codes after that")

    @model_validator(mode="after")
    def _check_code(self) -> Self:
        if self.rows is not None and self.rows != -1 and self.rows < 1:
            raise ValueError("rows is -1 (the whole matrix) or a positive number")
        if self.dim is not None and self.bits * self.dim > LONGEST:
            raise ValueError(f"a code has {LONGEST} bits at most: with dim {self.dim}, bits is {LONGEST // self.dim}")
        if self.outliers and (self.dim or 1) > 1:
            raise ValueError("`outliers` stand beside codes of single weights: leave out `dim`")
        return self

    def sharing(self, shape: tuple[int, int], dtype: torch.dtype) -> Sharing:
        """How the weights of a matrix [out, in] of this dtype share tables."""
        scaled = shape[1] >= SCALED if self.scales is None else self.scales
        values = UNITS if scaled else dtype
        dim = self.most(shape[1])
        while True:
            bits = 8 * values.itemsize * dim << self.bits * dim  # of a table
            rows = self._rows(shape, scaled, bits)
            if dim in (1, self.dim) or bits <= VECTORS * rows * shape[1]:
                return Sharing(dim, rows, scaled, values)
            dim //= 2

    def most(self, width: int) -> int:
        """How many inputs, of this many, may have one code."""
        if self.outliers:
            return 1
        return self.dim or next(dim for dim in (4, 2, 1) if self.bits * dim <= LONGEST and width % dim == 0)

    def _rows(self, shape: tuple[int, int], scaled: bool, bits: int) -> int:
        """How many outputs share a table that takes so many bits."""
        out, width = shape
        if self.rows is not None:
            return out if self.rows == -1 else self.rows
        room = OVERHEAD.get(self.bits, USUAL_OVERHEAD)
        enough = [rows for rows in range(1, out + 1) if out % rows == 0 and room * width * rows >= bits]
        least = min(enough, default=out)
        return max([least, *(rows for rows in enough if rows * width <= STRETCH)]) if scaled else least


class Kmeans(Method[KmeansConfig]):
    """K-means by sensitivity, with feedback."""

    task: ClassVar[Task] = "cluster"
    needs = Hessian
    Config = KmeansConfig

    @property
    def statistic(self) -> type[Statistic]:
        """The Hessian, where errors are weighed."""
        if self.config.weighting == "none":
            return NoStatistic
        return Fisher if self.config.weighting == "gradient" else Hessian

    def check(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix [out, in] of this shape cannot be clustered so, or None."""
        rows, dim = self.config.rows, self.config.dim or 1
        if rows is not None and rows != -1 and shape[0] % rows:
            return f"rows {rows} does not divide its {shape[0]} outputs"
        if shape[1] % dim:
            return f"dim {dim} does not divide its {shape[1]} inputs"
        found = self.config.sharing(shape, UNITS)
        entries, weights = found.dim << self.config.bits * found.dim, found.rows * shape[1]
        return None if weights > entries else f"a table of {entries} values would stand for {weights} weights"

    def prepare(self, statistic: Statistic) -> Prepared:
        """Factorise the Hessian once for all linears fed by the same tensor."""
        if not isinstance(statistic, Hessian):
            return Prepared()
        dim = self.config.most(len(statistic.matrix))
        return factorised(statistic, self.config, act_order=True, adjacent=dim, otherwise=FALLBACK, dead=FALLBACK[1])

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
        together = self.config.sharing(shape, UNITS).rows * shape[1]  # weights under one table
        return super().scratch((1, max(together, min(STRETCH, shape[0] * shape[1]))))

    def compress(self, weight: Tensor, prepared: Prepared) -> Layer:
        """Cluster one matrix [out, in]."""
        sharing = self.config.sharing((len(weight), weight.shape[1]), weight.dtype)
        size = _stretch(sharing, weight.shape[1])
        return stacked([self._clustered(part, prepared, sharing) for part in torch.split(weight, size)])

    def _clustered(self, weight: Tensor, prepared: Prepared, sharing: Sharing) -> Layer:
        W = weight.float()
        factors = prepared if isinstance(prepared, Factors) else None
        first = self._nearest(W, sharing, self._importance(factors))
        if factors is None:
            first = _with_zeros(W, first, sharing)
            return Layer(self._form(first, sharing))
        found = first
        if self.config.feedback:
            found = swept(W, found, factors)
            for _ in range(self.config.refine):
                if sharing.scaled:
                    found = rescaled(W, found, factors, SCALE)
                found = moved(W, refitted(W, found, factors, sharing.values), factors)
        first, found = (_with_zeros(W, codes, sharing) for codes in (first, found))
        chosen, objective = _better(W, first, found, factors.H)
        return Layer(self._form(chosen, sharing), objective)

    def _importance(self, factors: Factors | None) -> Tensor | None:
        """What an error of each input counts [in]: with feedback what is left of it once others make up for it."""
        if factors is None:
            return None
        return factors.importance if self.config.feedback else factors.H.diagonal()

    def _nearest(self, W: Tensor, sharing: Sharing, importance: Tensor | None) -> Codes:
        """The best tables for the rows under their scales, and the nearest of their entries."""
        groups, free = len(W) // sharing.rows, self._free(W)
        scale, weights = _scale(W, sharing, free), None
        units = (W / scale).reshape(groups, -1, sharing.dim)
        if importance is not None or sharing.scaled or free is not None:
            weights = (scale / scale.amax()).square() * (W.new_ones(W.shape[1]) if importance is None else importance)
            weights = weights * (W.count_nonzero(1) > 0)[:, None]  # rows of zeros stay so
            weights = weights if free is None else weights.masked_fill_(free, 0)
            weights = weights.view(groups, -1, sharing.dim)
        seen = units if free is None else units.masked_fill(free.view(units.shape), 0)  # some are too large for a table
        table = _tables(seen, weights, 1 << self.config.bits * sharing.dim).to(sharing.values).float()
        found = Codes(table, scale, nearest(units, table, weights).view(len(W), -1), free)
        return found if free is None else replace(found, apart=beside(W - found.weight(), free))

    def _free(self, W: Tensor) -> Tensor | None:
        """Which weights of a stretch keep numbers of their own: bool [out, in], or None."""
        number = self._outliers(W.numel())
        if not number:
            return None
        size = (W / _rms(W, None)).abs_().flatten()
        return torch.zeros_like(size, dtype=torch.bool).index_fill_(0, size.topk(number).indices, True).view(W.shape)

    def _outliers(self, weights: int) -> int:
        return max(1, round(self.config.outliers * weights)) if self.config.outliers else 0

    def _form(self, found: Codes, sharing: Sharing) -> Form:
        scale = found.scale[:, 0].to(SCALE) if sharing.scaled else None
        codes, table = found.codes.to(torch.uint8), found.table.to(sharing.values)
        book = Codebook(codes, table, self.config.bits * sharing.dim, scale)
        if found.free is None or found.apart is None:
            return book
        width, free = found.free.shape[1], found.free
        columns, counts = free.nonzero()[:, 1].to(_places(width)), free.sum(1).to(_places(width))
        return Sum((book, Scattered(found.apart[free].to(STORED), columns, counts, width)))

    def form(self, shape: tuple[int, int], dtype: torch.dtype) -> Layer:
        """The same structure on the `meta` device."""
        (out, width), sharing = shape, self.config.sharing(shape, dtype)
        code = self.config.bits * sharing.dim
        codes = _empty((out, width // sharing.dim), torch.uint8)
        table = _empty((out // sharing.rows, 1 << code, sharing.dim), sharing.values)
        book = Codebook(codes, table, code, _empty((out,), SCALE) if sharing.scaled else None)
        rows = range(0, out, _stretch(sharing, width))
        number = sum(self._outliers(min(rows.step, out - start) * width) for start in rows)
        if not number:
            return Layer(book)
        places = _places(width)
        apart = Scattered(_empty((number,), STORED), _empty((number,), places), _empty((out,), places), width)
        return Layer(Sum((book, apart)))


def _stretch(sharing: Sharing, width: int) -> int:
    """How many rows are clustered at a time."""
    return max(1, STRETCH // (sharing.rows * width)) * sharing.rows


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _places(width: int) -> torch.dtype:
    """What numbers of columns, and how many there are of them in a row, are stored as."""
    return torch.int16 if width <= torch.iinfo(torch.int16).max else torch.int32


def _scale(W: Tensor, sharing: Sharing, free: Tensor | None) -> Tensor:
    """What each row is counted in [out, 1], as it is stored."""
    return _rms(W, free).to(SCALE).float() if sharing.scaled else torch.ones_like(W[:, :1])


def _rms(W: Tensor, free: Tensor | None) -> Tensor:
    """The root mean square of each row's weights, but for those that are free; 1 where it is 0: [out, 1]."""
    kept = W if free is None else W.masked_fill(free, 0)
    largest = kept.abs().amax(1, keepdim=True)
    unit = torch.where(largest > 0, largest, 1)  # squares of what is far from 1 are zero, or infinite
    number = W.shape[1] if free is None else (~free).sum(1, keepdim=True).clamp_(min=1)
    size = unit * ((kept / unit).square().sum(1, keepdim=True) / number).sqrt()
    return torch.where(size > 0, size, 1)


def _tables(units: Tensor, weights: Tensor | None, count: int) -> Tensor:
    """The best `count` entries for each of `units` [groups, n, dim]: float32 [groups, count, dim]."""
    if units.shape[2] > 1:
        masses = [None] * len(units) if weights is None else weights
        return torch.stack([vectors.centres(x, mass, count) for x, mass in zip(units, masses, strict=True)])
    many = units.shape[1] > clusters.MANY  # then bins as fine as bfloat16 say where values are
    seen = units.bfloat16().float() if many else units
    return clusters.centroids(seen[..., 0], None if weights is None else weights[..., 0], count)[..., None]


def _with_zeros(W: Tensor, found: Codes, sharing: Sharing) -> Codes:
    """The same with rows of zeros as zeros: by their scale, or the entry next to zero becomes it.

    Of a table of tokens it is the one for padding, which is often the first of every text too: a norm makes any small
    state that it leaves as large as all others.
    """
    empty = W.count_nonzero(1) == 0
    if not empty.any():
        return found
    apart = None if found.apart is None else found.apart.masked_fill(empty[:, None], 0)
    if sharing.scaled:
        return replace(found, scale=found.scale.masked_fill(empty[:, None], 0), apart=apart)
    least = found.table.square().sum(2).argmin(1)
    there, table = empty.view(len(least), -1).any(1).nonzero()[:, 0], found.table.clone()
    table[there, least[there]] = 0
    codes = torch.where(empty[:, None], least.repeat_interleave(sharing.rows)[:, None], found.codes)
    return replace(found, table=table, codes=codes, apart=apart)


def _better(W: Tensor, one: Codes, other: Codes, H: Tensor) -> tuple[Codes, Objective]:
    """Of two results, for each table the one with the smaller output error; `one` is the baseline."""
    baseline, own = (output_error(W, codes.weight(), H) for codes in (one, other))
    groups = len(one.table)
    better = own.view(groups, -1).sum(1) <= baseline.view(groups, -1).sum(1)
    rows = better.repeat_interleave(len(W) // groups)
    mine, theirs = better[:, None, None], rows[:, None]
    chosen = Codes(
        torch.where(mine, other.table, one.table),
        torch.where(theirs, other.scale, one.scale),
        torch.where(theirs, other.codes, one.codes),
        one.free,
        None if one.apart is None or other.apart is None else torch.where(theirs, other.apart, one.apart),
    )
    return chosen, Objective(torch.where(rows, own, baseline), baseline)


METHOD = Kmeans
