"""The codes that a checkpoint holds already, unchanged: what an export to another format writes.

No recipe names it as a method: there is nothing to choose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from llmshrink.forms import Dense, Form, InputScheme, Layer, Quantized, without_data
from llmshrink.methods.base import Method, MethodConfig, Prepared, Task
from llmshrink.statistics import NoStatistic


class KeepConfig(MethodConfig):
    """What is stored."""

    bits: int | None = Field(None, description="bits per weight; null: decoded already")
    group_size: int | None = Field(None, description="weights that share a scale; -1: a whole row")


class Keep(Method[KeepConfig]):
    """One stored matrix. Not pure like other methods: it looks at the file again when it is asked for its codes."""

    task: ClassVar[Task] = "export"
    needs = NoStatistic
    Config = KeepConfig

    def __init__(
        self, read: Callable[[], Form], scales: torch.dtype | None, rounded: InputScheme | None = None
    ) -> None:
        """`read` gives the stored form [out, in], `rounded` its inputs; scales get `scales`, or None: stay."""
        self._read, self._input = read, _stored_in(scales, rounded)
        stored = read()
        form = _rescaled(stored, scales)
        self._fits = _same_scales(stored, form)
        self._meta = Layer(without_data(form), input=_stored_in(torch.device("meta"), self._input))
        scheme, size = self._meta.scheme, getattr(form, "block", None)
        if scheme is not None:
            size = scheme.group_size or -1
        config = KeepConfig(bits=getattr(form, "bits", None), group_size=size)
        super().__init__(config, scales)

    def check(self, shape: tuple[int, int]) -> str | None:
        """Why the stored form cannot be kept, or None."""
        return None if self._fits else f"its scales lie outside of what {self.scales} holds, in which they are written"

    def compress(self, weight: Tensor, prepared: Prepared) -> Layer:
        """The stored form; `weight`, which is what it decodes to, is not looked at."""
        return Layer(_rescaled(self._read(), self.scales), input=self._input)

    def form(self, shape: tuple[int, int], dtype: torch.dtype) -> Layer:
        """The same structure on the `meta` device."""
        return self._meta


def _stored_in(place: torch.dtype | torch.device | None, rounded: InputScheme | None) -> InputScheme | None:
    """With its scale in another dtype, or on another device."""
    if place is None or rounded is None or rounded.scale is None:
        return rounded
    return replace(rounded, scale=rounded.scale.to(place))


def _rescaled(form: Form, dtype: torch.dtype | None) -> Form:
    """With scales in what the format stores; tables of scales (bitsandbytes) have a dtype of their own."""
    if dtype is not None and isinstance(form, Quantized) and form.levels is None and isinstance(form.scale, Dense):
        return replace(form, scale=Dense(form.scale.weight.to(dtype)))
    return form


def _same_scales(stored: Form, rounded: Form) -> bool:
    """Whether scales are only rounded: none overflows, none becomes zero."""
    if not (isinstance(stored, Quantized) and isinstance(rounded, Quantized)):
        return True
    if not (isinstance(stored.scale, Dense) and isinstance(rounded.scale, Dense)):
        return True
    before, after = stored.scale.weight, rounded.scale.weight
    return bool(torch.isfinite(after).all()) and torch.equal(before == 0, after == 0)
