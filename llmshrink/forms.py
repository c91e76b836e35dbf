"""What a compression method may return: a small closed set of frozen forms that nest.

A form holds what is STORED: codes as integers, scales already rounded to the dtype they are written in. `decode`
gives back the float32 matrix that the stored numbers mean, so that "the error of the file" and "the error of the
method" are the same thing. Formats pack forms into tensors and back; methods make them; neither knows the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """A matrix (or table of scales) stored as it is."""

    weight: Tensor  # any shape, any float dtype


@dataclass(frozen=True)
class Quantized:
    """Integer codes under a table of scales.

    `block` says which weights share a scale: a pair (rows, cols) tiles the matrix, e.g. (1, 128) for groups of 128
    inputs, (1, in) for one scale per output channel; an int counts weights of the flattened matrix (bitsandbytes).

    A weight means `scale * (code - zero)`, or `scale * levels[code]` where a table of levels is given.
    """

    codes: Tensor  # [out, in]; int8, signed in [-2^(bits-1), 2^(bits-1)-1], or uint8 indices into `levels`
    scale: Form  # decodes to [out / rows, in / cols], or [ceil(out * in / block)]
    zero: Tensor | None  # int8, the shape of the scales, signed like the codes; None: symmetric
    levels: Tensor | None  # float32 [2^bits], None for an even grid
    block: tuple[int, int] | int
    bits: int
    offset: Tensor | None = None  # float32 scalar added to what the codes mean (the mean of a nested scale table)


Form = Dense | Quantized


@dataclass(frozen=True)
class Event:
    """Something that a run did differently from what the recipe says, or that its reader should know."""

    kind: str  # a stable word: "rtn_fallback", "damping", "dead_columns", ...
    message: str
    layer: str | None = None
    data: dict[str, float] | None = None


@dataclass(frozen=True)
class Layer:
    """The result of compressing one matrix."""

    weight: Form
    objective: float | None = None  # the error the method minimises, as a share of its baseline's on the same matrix
    events: tuple[Event, ...] = ()


def decode(form: Form) -> Tensor:
    """The float32 matrix that the stored numbers mean, exactly as a reader computing in float32 finds it."""
    if isinstance(form, Dense):
        return form.weight.float()
    scale = decode(form.scale)
    values = form.codes.float() if form.levels is None else form.levels.float()[form.codes.long()]
    if isinstance(form.block, int):
        flat = scale.flatten().repeat_interleave(form.block)[: values.numel()].view(values.shape)
        values = values * flat
    else:
        rows, cols = form.block
        out, width = values.shape
        tiled = values.view(out // rows, rows, width // cols, cols)
        if form.zero is not None:
            tiled = tiled - form.zero.float()[:, None, :, None]
        values = (tiled * scale[:, None, :, None]).view(out, width)
    return values if form.offset is None else values + form.offset.float()


def split_rows(layer: Layer, rows: list[int]) -> list[Layer]:
    """The results of matrices that were compressed stacked on top of each other, `rows` [out] of each."""
    form = layer.weight
    if isinstance(form, Dense):
        return [replace(layer, weight=Dense(part)) for part in torch.split(form.weight, rows)]
    if isinstance(form.block, int) or form.block[0] != 1 or not isinstance(form.scale, Dense):
        raise ValueError("scales that span rows cannot be split by rows")
    zeros: Sequence[Tensor | None] = [None] * len(rows) if form.zero is None else torch.split(form.zero, rows)
    parts = zip(torch.split(form.codes, rows), torch.split(form.scale.weight, rows), zeros, strict=True)
    return [replace(layer, weight=replace(form, codes=c, scale=Dense(s), zero=z)) for c, s, z in parts]


def relative_error(original: Tensor, decoded: Tensor) -> float:
    """||W - Q|| / ||W||, Frobenius, summed in float64: the same number whoever computes it."""
    norm = float(original.square().sum(dtype=torch.float64))
    return (float((original - decoded).square().sum(dtype=torch.float64)) / norm) ** 0.5 if norm else 0.0


__all__ = ["Dense", "Event", "Form", "Layer", "Quantized", "decode", "relative_error", "split_rows"]
