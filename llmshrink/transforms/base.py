"""The contract of a transform: for channels between two layers, an invertible map that the next layer takes back.

Wherever one part of a block hands a tensor x to the next, and nothing in between minds, what gives x may give x A, if
what takes it is made for that: W A^-T in place of W. The function stays, the numbers that are rounded are others.
Where such a place is, and which A it allows, is a `Link` of `model/flow.py`; a transform only chooses A.

A transform file defines one subclass of `Rotating` or `Scaling` and ends with `TRANSFORM = ThatClass`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, Protocol, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from llmshrink.statistics import Gathered, Statistic
from llmshrink.transforms.rotation import Rotation

LinkKind = Literal["norm", "values", "product"]
"""Who gives the channels: a norm's weights, the values of attention, or a factor of an elementwise product."""


class Change(Protocol):
    """An invertible map A of channels; tensors have these last, as many times as it is wide."""

    def produced(self, x: Tensor) -> Tensor:
        """What gives the channels: x A."""

    def consumed(self, weight: Tensor) -> Tensor:
        """What takes them: W A^-T."""

    def repeated(self, times: int, size: int) -> Change:
        """The same where every stretch of `size` channels is taken by so many: heads that share their values."""


@dataclass(frozen=True)
class Diagonal:
    """Channels divided by `scale` [width], which the next layer multiplies back.

    A scale may be zero only where what gives the channel is zero too; a one is put there.
    """

    scale: Tensor

    def produced(self, x: Tensor) -> Tensor:
        """Channels of what gives them, divided."""
        scale = self.scale.to(x.device, x.dtype)
        return torch.where(scale == 0, torch.ones_like(x), x / scale)

    def consumed(self, weight: Tensor) -> Tensor:
        """Channels of what takes them, multiplied."""
        return weight * self.scale.to(weight.device, weight.dtype)

    def repeated(self, times: int, size: int) -> Diagonal:
        """The same for heads that share their values."""
        return Diagonal(repeat(self.scale, times, size))


def repeat(channels: Tensor, times: int, size: int) -> Tensor:
    """Every stretch of `size` entries so many times: [width] -> [times * width]."""
    return channels.view(-1, size).repeat_interleave(times, 0).flatten()


class TransformConfig(BaseModel):
    """Base of every transform's settings: frozen, unknown keys refused, each field described."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


C = TypeVar("C", bound=TransformConfig)


class Transform(ABC, Generic[C]):
    """One algorithm with its settings."""

    Config: ClassVar[type[TransformConfig]]

    def __init__(self, config: C) -> None:
        self.config: C = config


class RotatingConfig(TransformConfig):
    """Settings of what turns channels."""

    residual: bool | None = Field(
        None, description="turn the states between blocks; null: where the model allows it, and it is told where not"
    )
    heads: bool = Field(True, description="turn the values of each head")
    allow_untie: bool = Field(
        False, description="give a head that is tied to the embedding a tensor of its own, so that states can be turned"
    )


R = TypeVar("R", bound=RotatingConfig)


class Rotating(Transform[R]):
    """Looks at no data: it turns the states between blocks, the values of each head, or both."""

    @abstractmethod
    def stream(self, width: int) -> Rotation:
        """The rotation of states of this width."""

    @abstractmethod
    def values(self, width: int) -> Rotation:
        """The rotation of the values of a head of this width."""


@dataclass(frozen=True)
class Fed:
    """One tensor of a block and the matrices that it is fed to."""

    gathered: Gathered  # of the tensor, on calibration text
    tokens: int
    read: tuple[Callable[[], Tensor], ...]  # gives each matrix [out, in], float32
    rounded: tuple[Callable[[Tensor], Tensor], ...]  # what is left of each after rounding to nearest on its own grid


@dataclass(frozen=True)
class Found:
    """The scales that were chosen for a link."""

    scale: Tensor  # float32 [width], positive
    error_left: float | None = None  # share of the squared error of rounding; None: it was not looked at


class Scaling(Transform[C]):
    """Looks at the inputs of a block's layers: it makes some channels larger and the weights on them smaller."""

    links: ClassVar[tuple[LinkKind, ...]]  # where it works
    needs: ClassVar[type[Statistic]]

    @abstractmethod
    def search(self, fed: list[Fed], repeats: tuple[int, int]) -> Found:
        """The scales of one link.

        Args:
            fed: every tensor that has these channels, with what it is fed to; of experts each has its own.
            repeats: how often, and in stretches of how many, the channels of what gives them appear in these tensors.
        """


def combined(channels: Tensor, repeats: tuple[int, int], how: Callable[[Tensor], Tensor]) -> Tensor:
    """One number for each channel of what gives them, from those of what takes them; `how` reduces dimension 1."""
    times, size = repeats
    return how(channels.view(-1, times, size)).flatten()
