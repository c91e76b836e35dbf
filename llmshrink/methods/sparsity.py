"""Which weights of a matrix are kept, and what those that are kept become once the others are gone.

A mask is chosen by a score: the weights with the lowest are dropped, as many as asked for to the last one, so that the
bytes of a result are known before any weight is read. What is dropped leaves an error in the outputs, and the weights
that stay can make up for a part of it: `refit` is the least-squares solution on the kept weights of each row,

    min_V tr((V - W) H (V - W)^T),  V zero where the mask is,

found by conjugate gradients for all rows at once, which needs products with H alone (the closed form factorises another
part of H for every row). Weights that fit their diagonal only is where it begins and what preconditions it. Solving for
the kept weights after any mask is the repair of Frantar and Alistarh 2023 (SparseGPT, arXiv 2301.00774, section 3.1);
conjugate gradients for it are taken from ALPS (Meng et al. 2024, arXiv 2406.07831).
"""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from llmshrink.forms import Dense, Event, Layer, Objective, Sparse
from llmshrink.methods.base import Method, MethodConfig, Prepared, ShareConfig, Task
from llmshrink.methods.hessian import DampConfig, descended, output_error
from llmshrink.statistics import Hessian, Norm, NoStatistic, Statistic

Per = Literal["row", "matrix"]  # which weights compete

LARGEST_PATTERN = 16  # adjacent inputs of a pattern: the table of its 2^M masks is looked up
ENOUGH = 1e-4  # of the error's gradient is left where conjugate gradients stop
ROWS, LOOKED = 16, 32  # of the first rows, weights beside each other
DIFFER = 0.75  # share of these that differ at least where nothing was rounded
PRUNED = 0.05  # of a matrix is zero where somebody pruned it; trained weights hardly ever are


class SparsityConfig(ShareConfig):
    """Settings shared by the methods that drop single weights."""

    sparsity: float | None = Field(
        None, ge=0, lt=1, description="share of the weights that are dropped; null: what the pattern says, or 0.5"
    )
    pattern: str | None = Field(
        None, description="N:M keeps N weights of each M adjacent inputs, e.g. 2:4; null: any weights may go"
    )

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, pattern: str | None) -> str | None:
        if pattern is None:
            return None
        found = re.fullmatch(r"(\d+):(\d+)", pattern)
        if found is None:
            raise ValueError("a pattern is N:M, such as 2:4")
        n, m = int(found[1]), int(found[2])
        if not 0 < n < m:
            raise ValueError(f"{pattern} keeps {n} of {m} weights: N must be at least 1 and less than M")
        if m > LARGEST_PATTERN:
            raise ValueError(f"{pattern}: M can be {LARGEST_PATTERN} at most")
        return pattern

    @model_validator(mode="after")
    def _check_both(self) -> Self:
        if self.kept_of is not None and self.sparsity is not None:
            n, m = self.kept_of
            if abs(self.sparsity - (1 - n / m)) > 1e-9:  # noqa: PLR2004 - decimals in a recipe
                raise ValueError(
                    f"the pattern {self.pattern} drops {1 - n / m:g} of the weights, not {self.sparsity:g}"
                )
        return self

    @property
    def kept_of(self) -> tuple[int, int] | None:
        """(N, M) of the pattern."""
        if self.pattern is None:
            return None
        n, m = self.pattern.split(":")
        return int(n), int(m)

    @property
    def share(self) -> float:
        """The share of the weights that are dropped."""
        if self.kept_of is not None:
            return 1 - self.kept_of[0] / self.kept_of[1]
        return 0.5 if self.sparsity is None else self.sparsity

    def at(self, share: float) -> dict[str, Any]:
        """The keys of a layer that drops another share."""
        return {"sparsity": share}

    @property
    def label(self) -> str:
        """2of4, or percents dropped."""
        return self.pattern.replace(":", "of") if self.pattern else f"{self.share:.0%}".rstrip("%")

    def why_not(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix [out, in] of this shape cannot be pruned so, or None."""
        if self.kept_of is not None and shape[1] % self.kept_of[1]:
            return f"the pattern {self.pattern} does not divide the width {shape[1]}"
        return None


class RowConfig(SparsityConfig, DampConfig):
    """Settings of the methods that score each weight by itself."""

    per: Per = Field("row", description="which weights compete: those of one output, or those of the whole matrix")
    refit: int = Field(
        0,
        ge=0,
        description="steps of conjugate gradients that fit the kept weights to the outputs of the layer; 0: they stay",
    )


@dataclass(frozen=True, kw_only=True)
class Seen(Prepared):
    """What the linears of a group share."""

    square: Tensor  # float32 [in], mean square of each input
    H: Tensor | None = None  # float32 [in, in], where kept weights are refitted
    damp: float = 0.0  # added to its diagonal


class ScoreMethod(Method[RowConfig]):
    """A method that scores each weight by itself, drops the lowest, and may refit the others."""

    task: ClassVar[Task] = "prune"
    needs: ClassVar[type[Statistic]] = NoStatistic
    Config: ClassVar[type[MethodConfig]] = RowConfig

    @property
    def by_row(self) -> bool:  # type: ignore[override] # it follows from the settings
        """Whether rows do not depend on each other."""
        return self.config.per == "row" or self.config.pattern is not None

    @property
    def statistic(self) -> type[Statistic]:
        """What the scores need; where weights are refitted the Hessian, whose diagonal says the same."""
        return Hessian if self.config.refit else self.needs

    def check(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix [out, in] of this shape cannot be pruned so, or None."""
        return self.config.why_not(shape)

    def prepare(self, statistic: Statistic) -> Prepared:
        """The inputs' mean squares, and their Hessian where it is used."""
        if isinstance(statistic, NoStatistic):
            return Prepared()
        if statistic.tokens == 0:
            return Prepared((Event("magnitude_fallback", "pruned by magnitude: no calibration token reached it"),))
        if not isinstance(statistic, Hessian):
            assert isinstance(statistic, Norm)
            return Seen(square=statistic.square)
        H = statistic.matrix
        return Seen(square=H.diagonal(), H=H, damp=self.config.damp * float(H.diagonal().mean()))

    @abstractmethod
    def score(self, weight: Tensor, prepared: Prepared) -> Tensor:
        """What each weight [out, in], float32, is worth: float32 of the same shape."""

    def compress(self, weight: Tensor, prepared: Prepared) -> Layer:
        """Drop the lowest scores of a matrix [out, in]."""
        W = weight.float()
        mask = keep_highest(self.score(W, prepared), self.config, self.config.per)
        if not isinstance(prepared, Seen) or prepared.H is None:
            return Layer(pruned(W, mask, self.config, weight.dtype))
        plain = W * mask
        fitted = refit(W, plain, mask, prepared.H, prepared.damp, self.config.refit)
        return better_filled(W, mask, (plain, fitted), prepared.H, self.config, weight.dtype)

    def form(self, shape: tuple[int, int], dtype: torch.dtype) -> Layer:
        """The same structure on the `meta` device."""
        return Layer(meta(shape, dtype, self.config, self.config.per))


def kept_before(weight: Tensor) -> Tensor | None:
    """Where a matrix [out, in] that was pruned is not zero, bool; None: it was not pruned.

    Codes that were decoded have zeros too, and few values beside: they are not taken for pruned.
    """
    mask = weight != 0
    if float(mask.sum()) > (1 - PRUNED) * mask.numel():
        return None
    looked = [row[row != 0][:LOOKED].tolist() for row in weight[:ROWS]]
    differ = [len(set(row)) / LOOKED for row in looked if len(row) == LOOKED]
    return None if differ and median(differ) < DIFFER else mask


def zeros_kept(weight: Tensor, keep: Literal["auto"] | bool) -> Tensor | None:
    """Where a matrix may learn, bool; None: everywhere.

    Args:
        weight: [out, in].
        keep: auto: zeros of pruned matrices stay; True: all zeros; False: none.
    """
    if keep == "auto":
        return kept_before(weight)
    mask = weight != 0
    return mask if keep and not bool(mask.all()) else None


def dropped(shape: tuple[int, int], config: SparsityConfig, per: Per) -> int:
    """How many weights of a matrix [out, in] are dropped, exactly."""
    out, width = shape
    if config.kept_of is not None:
        n, m = config.kept_of
        return out * (width // m) * (m - n)
    return out * round(config.share * width) if per == "row" else round(config.share * out * width)


def keep_highest(score: Tensor, config: SparsityConfig, per: Per) -> Tensor:
    """The mask, bool [out, in], of the highest scores; of equal ones the later are kept."""
    if config.kept_of is not None:
        n, m = config.kept_of
        return highest(score.reshape(-1, m), n).view(score.shape)
    rows = score if per == "row" else score.reshape(1, -1)
    return highest(rows, rows.shape[1] - dropped((1, rows.shape[1]), config, "row")).view(score.shape)


def highest(score: Tensor, count: int) -> Tensor:
    """Bool [rows, n]: the `count` highest of each row; of equal ones the later, on every device alike."""
    drop = score.shape[1] - count
    if drop == 0:
        return torch.ones_like(score, dtype=torch.bool)
    edge = score.kthvalue(drop, dim=1, keepdim=True).values
    above, equal = score > edge, score == edge
    spare = equal.sum(1, keepdim=True) - (count - above.sum(1, keepdim=True))  # of the equal ones, how many go
    return above | (equal & (equal.cumsum(1) > spare))


def refit(W: Tensor, start: Tensor, mask: Tensor, H: Tensor, damp: float, steps: int) -> Tensor:
    """The kept weights [out, in] that bring the outputs of each row nearest to those of W.

    Args:
        W: float32 [out, in], what the outputs are to be those of.
        start: float32 [out, in], zero where the mask is false.
        mask: bool [out, in].
        H: float32 [in, in], of the inputs.
        damp: added to its diagonal.
        steps: of conjugate gradients, preconditioned by the diagonal; a row that has arrived stays.
    """

    def curved(V: Tensor) -> Tensor:
        return (V @ H).add_(V, alpha=damp).mul_(mask)

    return descended(start.clone(), curved(W - start), curved, H.diagonal() + damp, steps, ENOUGH).mul_(mask)


def better_filled(
    W: Tensor, mask: Tensor, found: tuple[Tensor, Tensor], H: Tensor, config: SparsityConfig, dtype: torch.dtype
) -> Layer:
    """Of two fillings of a mask, in each row the one with the smaller output error once it is stored."""
    first, second = (values.to(dtype) for values in found)
    baseline, own = (output_error(W, values.float(), H) for values in (first, second))
    better = (own <= baseline)[:, None]
    values = torch.where(better, second, first)
    objective = Objective(torch.where(better[:, 0], own, baseline), baseline)
    return Layer(pruned(values, mask, config, dtype), objective)


def pruned(values: Tensor, mask: Tensor, config: SparsityConfig, dtype: torch.dtype) -> Sparse:
    """The form of a matrix of which the mask is kept."""
    return Sparse(mask, Dense((values * mask).to(dtype)), int(mask.sum()), config.kept_of)


def meta(shape: tuple[int, int], dtype: torch.dtype, config: SparsityConfig, per: Per) -> Sparse:
    """A form of the right shapes and dtypes on the `meta` device."""
    mask = torch.empty(shape, dtype=torch.bool, device="meta")
    values = Dense(torch.empty(shape, dtype=dtype, device="meta"))
    kept = shape[0] * shape[1] - dropped(shape, config, per)
    return Sparse(mask, values, kept, config.kept_of)
