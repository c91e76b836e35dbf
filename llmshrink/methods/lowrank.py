"""A matrix as the product of two thinner ones, and what codes beside it can say of the rest.

The best product of rank r is known in closed form (`metric.principal`). What tells the methods apart is what inputs
weigh in it: the mean of x x^T (SVD-LLM, Wang et al. 2025, arXiv 2403.07378), a number for each input (ASVD, Yuan et al.
2023, arXiv 2312.05821), or nothing (the plain singular value decomposition).

A product needs r (out + in) numbers, of which r^2 say nothing: r rows of it make all others (`LowRank.pivots`).
With r (out + in - r), rank 141 of a matrix 256 x 256 takes what rank 102 takes otherwise.

With `bits`, the rest W - AB is not left out but becomes codes, and factors and codes are fitted to each other in turn
(CALDERA, Saha et al. 2024, arXiv 2405.18886, does so with a grid; here they are the tables of `kmeans`).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from llmshrink.forms import Codebook, Dense, Event, Form, Layer, LowRank, Objective, Quantized, Sum, decode
from llmshrink.methods.base import FLOAT, Method, Prepared, ShareConfig, Task
from llmshrink.methods.gptq import Gptq, GptqConfig
from llmshrink.methods.hessian import DampConfig, factorised
from llmshrink.methods.kmeans import STRETCH, Kmeans, KmeansConfig
from llmshrink.methods.metric import Metric, fitted, principal
from llmshrink.statistics import Hessian, Statistic

KEEP = 0.8  # of the numbers, where nobody says how many
FEW = 0.1  # bits a weight that factors beside codes take, where nobody says their rank
FACTOR_BITS: Literal[4] = 4  # of theirs, the same
FALLBACK = ("svd_fallback", "factored by the weights alone")
POOR = "correction_poor"
DOUBLE = 8  # bytes
COPIES, SQUARES = 4, 6  # float64 numbers while a matrix is factored: of its own size, of its smaller side's square


class KeepConfig(ShareConfig):
    """Settings of the methods of which one says how many numbers are kept."""

    @property
    @abstractmethod
    def kept(self) -> float:
        """The share of the numbers that is kept."""

    @property
    def share(self) -> float:
        """The share of the numbers that is saved."""
        return 1 - self.kept

    def at(self, share: float) -> dict[str, Any] | None:
        """The keys of a layer that saves another share; None where it saves nothing."""
        return {"keep": 1 - share} if share > 0 else None

    @property
    def label(self) -> str:
        """Percents kept."""
        return f"{self.kept:.0%}".rstrip("%")


class LowRankConfig(KeepConfig):
    """Settings of the methods that make products."""

    keep: float | None = Field(
        None, gt=0, lt=1, description="share of a matrix's numbers that its factors have; null: 0.8, or as `rank` says"
    )
    rank: int | None = Field(
        None,
        ge=1,
        description="rank of every product; null: the largest that `keep` allows, or with `bits` 0.1 bits a weight",
    )
    pivots: bool | None = Field(
        None,
        description="store rows of the product in place of a factor, which takes r^2 numbers fewer; null: unless there "
        "are `bits`",
    )
    bits: int | None = Field(
        None,
        ge=1,
        le=8,
        description="bits of the codes of what the product leaves, as kmeans makes them; null: it is left out",
    )
    factor_bits: Literal[2, 3, 4, 8] | None = Field(
        None, description="bits of the factors; null: floats of the model's dtype, and 4 beside codes"
    )
    rounds: int = Field(4, ge=1, description="with bits: times that factors and codes are fitted to each other")

    @model_validator(mode="after")
    def _check_keep(self) -> Self:
        said = next((name for name in ("rank", "bits") if getattr(self, name) is not None), None)
        if self.keep is not None and said is not None:
            raise ValueError(f"`{said}` says how many numbers are kept: leave out `keep`")
        return self

    @property
    def kept(self) -> float:
        """`keep` with its default worked out."""
        return KEEP if self.keep is None else self.keep

    @property
    def label(self) -> str:
        """Percents kept, or the rank."""
        if self.rank is None and self.bits is not None:
            return "r"
        return super().label if self.rank is None else f"r{self.rank}"

    @property
    def by_rows(self) -> bool:
        """Whether rows of the product are stored."""
        return self.bits is None if self.pivots is None else self.pivots

    @property
    def coded(self) -> Literal[2, 3, 4, 8] | None:
        """Bits of the factors; None: floats."""
        return FACTOR_BITS if self.bits is not None and self.factor_bits is None else self.factor_bits

    def numbers(self, shape: tuple[int, int], rank: int) -> int:
        """How many numbers a product of this rank has."""
        return rank * (sum(shape) - (rank if self.by_rows else 0))

    def most(self, shape: tuple[int, int]) -> int:
        """The largest rank that has fewer numbers than the matrix [out, in] itself."""
        return min(shape) - 1 if self.by_rows else (math.prod(shape) - 1) // sum(shape)

    def within(self, shape: tuple[int, int], share: float) -> int:
        """The largest rank whose product has this share of the numbers of a matrix [out, in]."""
        wanted = share * math.prod(shape) + 1 / 2  # a share that was worked out from a rank gives that rank
        if not self.by_rows:
            return int(wanted // sum(shape))
        half = sum(shape) / 2
        return int(half - math.sqrt(max(0.0, half**2 - wanted)))

    def rank_of(self, shape: tuple[int, int]) -> int:
        """The rank that a matrix [out, in] gets."""
        if self.rank is not None:
            return self.rank
        if self.bits is None:
            return self.within(shape, self.kept)
        return max(1, round(FEW * math.prod(shape) / ((self.coded or 16) * sum(shape))))

    def why_not(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix [out, in] of this shape cannot be factored so, or None."""
        rank, most = self.rank_of(shape), self.most(shape)
        if rank > most:
            return f"rank {rank} saves nothing: the largest that does is {most}"
        if rank < 1:
            least = self.numbers(shape, 1) / math.prod(shape)
            return f"keep {self.kept:g} leaves no rank: rank 1 has {least:.3g} of its numbers"
        return None


def moment(statistic: Statistic, config: DampConfig, adjacent: int = 1) -> Prepared:
    """The second moment of inputs, damped and factorised; `adjacent` of them stay together in its order."""
    assert isinstance(statistic, Hessian)
    return factorised(statistic, config, act_order=True, adjacent=adjacent, otherwise=FALLBACK, dead="not counted")


class LowRankMethod(Method[LowRankConfig]):
    """The nearest product under what inputs weigh."""

    task: ClassVar[Task] = "factorize"
    baseline: ClassVar[str | None] = "svd"
    Config = LowRankConfig

    @abstractmethod
    def metric(self, prepared: Prepared) -> Metric:
        """What inputs weigh."""

    def scratch(self, shape: tuple[int, int]) -> int:
        """Bytes that `compress` holds: the matrix and what comes of it, in float64."""
        whole, square = shape[0] * shape[1], min(shape) ** 2
        codes = 0 if self.config.bits is None else self.rest.scratch((1, min(whole, STRETCH))) + FLOAT * whole
        return DOUBLE * (COPIES * whole + SQUARES * square) + codes

    def pointless(self, shape: tuple[int, int]) -> str | None:
        """Why no product of a matrix [out, in] of this shape saves anything, or None."""
        return None if self.config.rank or self.config.most(shape) else "no product has fewer numbers"

    def check(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix [out, in] of this shape cannot be factored so, or None."""
        why = self.config.why_not(shape)
        return why if why or self.config.bits is None else self.rest.check(shape)

    @property
    def rest(self) -> Kmeans:
        """What makes codes of the rest, by its outputs where they are known."""
        assert self.config.bits is not None
        weighting: Literal["hessian", "none"] = "hessian" if issubclass(self.needs, Hessian) else "none"
        return Kmeans(KmeansConfig(bits=self.config.bits, weighting=weighting), self.scales)

    def compress(self, weight: Tensor, prepared: Prepared) -> Layer:
        """Factor one matrix [out, in]."""
        W, H = weight.double(), self.metric(prepared)
        if self.config.bits is not None:
            return self._corrected(W, H, prepared, weight.dtype)
        return Layer(self._product(W, H, prepared, weight.dtype))

    def _product(self, W: Tensor, H: Metric, prepared: Prepared, dtype: torch.dtype) -> LowRank:
        """The nearest product to W, as it is stored."""
        U = principal(W, H, self.config.rank_of((len(W), W.shape[1])))
        if not self.config.by_rows:
            V = U.T @ W
            V /= V.norm(dim=1, keepdim=True).sqrt().clamp(min=torch.finfo(dtype).tiny)  # both factors about as large
            right = self._stored(V, prepared, dtype)
            left = fitted(W, decode(right).double(), H)
            return LowRank(_turned(self._stored(left.T, Prepared(), dtype)), right)
        chosen = pivots(U)
        right = self._stored((U[chosen] @ U.T) @ W, prepared, dtype)
        left = fitted(W, decode(right).double(), H)[~chosen]
        return LowRank(self._stored(left, Prepared(), dtype), right, chosen)

    def _rounding(self, dtype: torch.dtype) -> Gptq | None:
        """What makes codes of a factor of a matrix in `dtype`, with a scale for each row; None: it stays as floats."""
        if self.config.coded is None:
            return None
        return Gptq(GptqConfig(bits=self.config.coded, group_size=-1), self.scales or dtype)

    def _stored(self, factor: Tensor, prepared: Prepared, dtype: torch.dtype) -> Form:
        """A factor in the dtype of the model, or as codes."""
        rounding = self._rounding(dtype)
        if rounding is None:
            return Dense(factor.to(dtype).contiguous())
        return rounding.compress(factor.to(torch.float32).contiguous(), prepared).weight

    def _corrected(self, W: Tensor, H: Metric, prepared: Prepared, dtype: torch.dtype) -> Layer:
        """Codes of W, and factors of what they leave, each in turn; of all rounds the best."""
        method = self.rest
        codes = method.compress(W.to(dtype), prepared).weight
        baseline = H.error(W - decode(codes))
        best, own = None, baseline
        for _ in range(self.config.rounds):
            product = self._product(W - decode(codes), H, prepared, dtype)
            codes = method.compress((W - decode(product)).to(dtype), prepared).weight
            form = Sum((product, codes))
            error = H.error(W - decode(form))
            if best is None or error.sum() < own.sum():
                best, own = form, error
        assert best is not None
        found = Objective(own.float(), baseline.float())
        return Layer(best, found, _poor(best, found))

    def form(self, shape: tuple[int, int], dtype: torch.dtype) -> Layer:
        """The same structure on the `meta` device."""
        (out, width), rank = shape, self.config.rank_of(shape)
        right = self._meta((rank, width), dtype)
        if self.config.by_rows:
            chosen = torch.empty(out, dtype=torch.bool, device="meta")
            product = LowRank(self._meta((out - rank, rank), dtype), right, chosen)
        else:
            product = LowRank(_turned(self._meta((rank, out), dtype)), right)
        return Layer(product if self.config.bits is None else Sum((product, self.rest.form(shape, dtype).weight)))

    def _meta(self, shape: tuple[int, int], dtype: torch.dtype) -> Form:
        """What `_stored` makes, without data."""
        rounding = self._rounding(dtype)
        if rounding is None:
            return Dense(torch.empty(shape, dtype=dtype, device="meta"))
        return rounding.form(shape, dtype).weight


def pivots(U: Tensor) -> Tensor:
    """Rows of U [out, rank] that make all others, with small shares of each: bool [out].

    They are those that elimination with partial pivoting takes.
    """
    swaps = torch.linalg.lu_factor(U)[1].tolist()
    order = list(range(len(U)))
    for i, other in enumerate(swaps):
        order[i], order[other - 1] = order[other - 1], order[i]
    chosen = torch.zeros(len(U), dtype=torch.bool, device=U.device)
    chosen[torch.tensor(order[: U.shape[1]], device=U.device)] = True
    return chosen


def _turned(form: Form) -> Form:
    """The transpose of floats, or of codes with a scale for each row."""
    if isinstance(form, Dense):
        return Dense(form.weight.T.contiguous())
    assert isinstance(form, Quantized) and isinstance(form.scale, Dense)
    scale = Dense(form.scale.weight.T.contiguous())
    return replace(form, codes=form.codes.T.contiguous(), scale=scale, block=(form.codes.shape[1], 1))


def _poor(form: Sum, found: Objective) -> tuple[Event, ...]:
    """Told where as many bits in finer codes would lower the error more: each bit makes it a quarter."""
    product, codes = form.parts
    assert isinstance(product, LowRank) and isinstance(codes, Codebook)
    bits = sum(_bits(part) for part in (product.left, product.right)) / codes.shape.numel()
    if found.share <= 4.0**-bits:
        return ()
    message = "its factors lessen the error of codes less than as many bits in finer codes: by 6 dB for each"
    return (Event(POOR, message, data={"share": found.share, "bits": bits}),)


def _bits(factor: Form) -> int:
    if isinstance(factor, Dense):
        return 8 * factor.weight.nbytes
    assert isinstance(factor, Quantized) and isinstance(factor.scale, Dense)
    return factor.bits * factor.codes.numel() + 8 * factor.scale.weight.nbytes
