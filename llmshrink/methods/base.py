"""The contract of a compression method: a pure function from a matrix and a statistic to a form.

A method file defines one `Method` subclass and ends with `METHOD = ThatClass`. The engine calls `prepare` once per
group of linears fed by the same tensor, then `compress` for each of them. Neither may touch modules, files or globals,
nor change its arguments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from llmshrink.forms import Event, Layer
from llmshrink.statistics import Statistic

Task = Literal["quantize", "export"]


class MethodConfig(BaseModel):
    """Base of every method's settings: frozen, unknown keys refused, each field described."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


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
    Config: ClassVar[type[MethodConfig]]

    def __init__(self, config: C, scales: torch.dtype | None = None) -> None:
        """`scales` is what the format stores scales in; None: the dtype of the weight."""
        self.config: C = config
        self.scales = scales

    def check(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix [out, in] of this shape cannot be compressed, or None: asked at plan time."""
        return None

    def prepare(self, statistic: Statistic) -> Prepared:
        """Work on the statistic once per group of linears: factorisations, orders."""
        return Prepared()

    @abstractmethod
    def compress(self, weight: Tensor, prepared: Prepared) -> Layer:
        """Compress one matrix [out, in] in the checkpoint's dtype."""

    @abstractmethod
    def form(self, shape: tuple[int, int], dtype: torch.dtype) -> Layer:
        """A result of the right shapes and dtypes on the `meta` device: exact bytes before any weight is read."""
