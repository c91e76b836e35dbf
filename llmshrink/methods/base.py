"""The contract of a compression method: a pure function from a matrix and a statistic to a form.

A method file defines one `Method` subclass and ends with `METHOD = ThatClass`. The engine calls `prepare` once per
group of linears fed by the same tensor, then `compress` for each of them. Neither may touch modules, files or globals,
nor change its arguments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from llmshrink.forms import Event, Layer
from llmshrink.statistics import Statistic

Task = Literal["quantize", "prune", "cluster", "factorize", "distill", "export"]


FLOAT = 4
SWEEP = 9  # float32 copies of what is compressed in one call


class MethodConfig(BaseModel):
    """Base of every method's settings: frozen, unknown keys refused, each field described."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class GroupConfig(MethodConfig):
    """Settings of the methods that give adjacent inputs one scale."""

    group_size: int | None = Field(
        None, description="adjacent inputs that share a scale; -1: one scale per output; null: resolved by the plan"
    )

    @field_validator("group_size")
    @classmethod
    def _check_group_size(cls, size: int | None) -> int | None:
        if size is not None and size != -1 and size < 1:
            raise ValueError("group_size is -1 (one scale per output) or a positive number")
        return size

    def group(self, width: int) -> int:
        """The number of adjacent inputs that share a scale in a matrix of this width."""
        if self.group_size is None:
            raise ValueError("group_size is null: the plan resolves it to a number before anything is compressed")
        return width if self.group_size == -1 else self.group_size

    def why_not(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix [out, in] of this shape cannot be cut into these groups, or None."""
        if self.group_size is None or self.group_size == -1:
            return None
        if shape[1] % self.group_size:
            return f"group_size {self.group_size} does not divide the width {shape[1]}"
        return None


class ShareConfig(MethodConfig, ABC):
    """Settings of the methods that take a share out of every matrix."""

    @property
    @abstractmethod
    def share(self) -> float:
        """The share of the numbers that goes."""

    @abstractmethod
    def at(self, share: float) -> dict[str, Any] | None:
        """The keys of a layer of which another share goes; None: it is left as it is."""

    @property
    @abstractmethod
    def label(self) -> str:
        """How much is left, for the name of a folder."""


C = TypeVar("C", bound=MethodConfig)


@dataclass(frozen=True)
class Prepared:
    """What `prepare` works out once for all linears of a group. Methods extend it."""

    events: tuple[Event, ...] = ()


class Method(ABC, Generic[C]):
    """One algorithm with its settings."""

    task: ClassVar[Task]
    needs: ClassVar[type[Statistic]]
    by_row: bool = False  # rows do not depend on each other: small matrices of a group go in one call
    baseline: ClassVar[str | None] = None  # the method that stands in where the statistic is too poor
    caution: ClassVar[str | None] = None  # what its user should know before any compute: told as an event
    learnable: ClassVar[bool] = True  # whether a weight may get any code between the least and the largest
    Config: ClassVar[type[MethodConfig]]

    def __init__(self, config: C, scales: torch.dtype | None = None) -> None:
        """`scales` is what the format stores scales in; None: the dtype of the weight."""
        self.config: C = config
        self.scales = scales

    @property
    def statistic(self) -> type[Statistic]:
        """What is to be gathered under these settings: `needs`, or a kind of it that knows more."""
        return self.needs

    @property
    def in_stretches(self) -> bool:
        """Whether a large matrix is taken a stretch of rows at a time, by the engine or by the method itself."""
        return self.by_row

    @property
    def alone(self) -> Method[Any]:
        """What does the same from weights alone, where the method needs no baseline for it."""
        return self

    def check(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix [out, in] of this shape cannot be compressed, or None: asked at plan time."""
        return None

    def pointless(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix [out, in] of this shape is left as it is, unless it is asked for, or None."""
        return None

    def scratch(self, shape: tuple[int, int]) -> int:
        """Bytes that `compress` holds of a matrix [out, in], or of the stretch of one that is taken at a time."""
        return SWEEP * FLOAT * shape[0] * shape[1]

    def prepare(self, statistic: Statistic) -> Prepared:
        """Work on the statistic once per group of linears: factorisations, orders."""
        return Prepared()

    @abstractmethod
    def compress(self, weight: Tensor, prepared: Prepared) -> Layer:
        """Compress one matrix [out, in] in the checkpoint's dtype."""

    @abstractmethod
    def form(self, shape: tuple[int, int], dtype: torch.dtype) -> Layer:
        """A result of the right shapes and dtypes on the `meta` device: exact bytes before any weight is read."""


def method_name(method: Method[Any]) -> str:
    """The name of a method in a recipe: that of its file."""
    return type(method).__module__.rpartition(".")[2]
