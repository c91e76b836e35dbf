"""What a compression method may return: a small closed set of frozen forms that nest.

A form holds what is STORED: codes as integers, scales already rounded to the dtype they are written in. `decode`
gives back the float32 matrix that the stored numbers mean, so that "the error of the file" and "the error of the
method" are the same thing. Formats pack forms into tensors and back; methods make them; neither knows the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

ROWS = 256  # of a matrix that are compared at a time
CodeKind = Literal["int", "float"]  # of 8-bit numbers: int8, or float8_e4m3fn
LARGEST: dict[CodeKind, float] = {"int": 127.5, "float": 448.0}  # what the largest magnitude is divided by for a scale
LIMITS: dict[CodeKind, tuple[float, float]] = {"int": (-128.0, 127.0), "float": (-448.0, 448.0)}
InputKind = CodeKind | Literal["llm-int8", "bitnet"]


@dataclass(frozen=True)
class Dense:
    """A matrix (or table of scales) stored as it is."""

    weight: Tensor  # any shape, any float dtype


@dataclass(frozen=True)
class Quantized:
    """Codes, integers or 8-bit floats, under a table of scales.

    `block` says which weights share a scale: a pair (rows, cols) tiles the matrix, e.g. (1, 128) for groups of 128
    inputs, (1, in) for one scale per output channel, (out, in) for one of the whole matrix; an int counts weights of
    the flattened matrix (bitsandbytes).

    A weight means `scale * (code - zero)`, or `scale * levels[code]` where a table of levels is given.
    """

    codes: Tensor  # [out, in]; int8 in [-2^(bits-1), 2^(bits-1)-1], uint8 indices into `levels`, or float8_e4m3fn
    scale: Form  # decodes to [out / rows, in / cols], or [ceil(out * in / block)]
    zero: Tensor | None  # int8, the shape of the scales, signed like the codes; None: symmetric
    levels: Tensor | None  # float32 [2^bits], None for an even grid
    block: tuple[int, int] | int
    bits: int
    offset: Tensor | None = None  # float32 scalar added to what the codes mean (the mean of a nested scale table)

    @property
    def scheme(self) -> Scheme | None:
        """What a loader must be told to decode it; None for level tables and scales that span some rows."""
        if self.levels is not None or isinstance(self.block, int):
            return None
        (rows, size), (out, width) = self.block, self.codes.shape
        whole = (rows, size) == (out, width) and out > 1
        if rows != 1 and not whole:
            return None
        kind: CodeKind = "float" if self.codes.is_floating_point() else "int"
        return Scheme(self.bits, self.zero is None, None if size == width else size, kind, whole)


Form = Dense | Quantized


@dataclass(frozen=True)
class InputScheme:
    """How the inputs of a linear are rounded to 8 bits before it multiplies them, symmetric around zero."""

    kind: InputKind
    scale: Tensor | None = None  # [1], in the dtype it is stored in; None: each token has its own (dynamic)
    threshold: float = 0.0  # of llm-int8: a feature in which a token reaches it is not rounded; 0: every feature is

    def round(self, x: Tensor) -> Tensor:
        """The inputs [..., tokens, in] that the rounded numbers mean, in the dtype of `x`.

        Int and float as in compressed-tensors 0.20 (`forward`): a token's own scale is its largest magnitude / 127.5,
        of float8 / 448, and the dtype's epsilon where that is 0.
        """
        if self.kind == "llm-int8":
            return _round_llm_int8(x, self.threshold)
        if self.kind == "bitnet":
            return _round_bitnet(x)
        if self.scale is None:
            low, high = torch.aminmax(x, dim=-1, keepdim=True)
            scale = torch.maximum(high, -low) / LARGEST[self.kind]
            scale = scale.masked_fill_(scale == 0, torch.finfo(x.dtype).eps)
        else:
            scale = self.scale.to(x.device, x.dtype)
        codes = (x / scale).clamp_(*LIMITS[self.kind])
        codes = codes.round_() if self.kind == "int" else codes.to(torch.float8_e4m3fn).to(x.dtype)
        return codes.mul_(scale)


@dataclass(frozen=True)
class Scheme:
    """How codes that mean multiples of a scale are to be read, and what becomes of the inputs they multiply."""

    bits: int
    symmetric: bool
    group_size: int | None  # adjacent inputs that share a scale; None: one scale per output
    kind: CodeKind = "int"
    whole: bool = False  # one scale for the whole matrix
    inputs: tuple[InputKind, Literal["dynamic", "static"]] | None = None  # None: not rounded


@dataclass(frozen=True)
class Event:
    """Something that a run did differently from what the recipe says, or that its reader should know."""

    kind: str  # a stable word: "rtn_fallback", "damping", "dead_columns", ...
    message: str
    layer: str | None = None
    data: dict[str, float] | None = None


@dataclass(frozen=True)
class Objective:
    """The error that a method minimises, and what its baseline makes of the same rows."""

    own: Tensor  # float32 [out]
    baseline: Tensor  # float32 [out]

    @property
    def share(self) -> float:
        """The method's error as a share of its baseline's; 1 where the baseline makes none."""
        total = float(self.baseline.sum())
        return float(self.own.sum()) / total if total else 1.0


def _round_llm_int8(x: Tensor, threshold: float) -> Tensor:
    """LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339, section 3.2), as bitsandbytes 0.50 does it on a CPU."""
    half = x.half()
    outlier = half.abs() >= threshold if threshold else torch.zeros_like(half, dtype=torch.bool)
    half = half.masked_fill(outlier, 0)
    largest = half.abs().amax(-1, keepdim=True).float()
    rounded = (half * (127.0 / largest)).round_().nan_to_num_() * (largest / 127.0)
    return torch.where(outlier.any(-2, keepdim=True), x, rounded.to(x.dtype))


def _round_bitnet(x: Tensor) -> Tensor:
    """BitNet b1.58 (Ma et al. 2024, arXiv 2402.17764, section 2), as `ActQuant` of transformers 5.23 does it."""
    share = 127 / x.float().abs().amax(-1, keepdim=True).clamp_(min=1e-5)
    return ((x.float() * share).round_().clamp_(-128, 127) / share).to(x.dtype)


@dataclass(frozen=True)
class Layer:
    """The result of compressing one matrix."""

    weight: Form
    objective: Objective | None = None
    events: tuple[Event, ...] = ()
    input: InputScheme | None = None  # None: inputs are not rounded

    @property
    def scheme(self) -> Scheme | None:
        """What a loader must be told to decode it; None where its codes are no multiples of a scale."""
        found = self.weight.scheme if isinstance(self.weight, Quantized) else None
        if found is None or self.input is None:
            return found
        return replace(found, inputs=(self.input.kind, "dynamic" if self.input.scale is None else "static"))


def decode(form: Form) -> Tensor:
    """The float32 matrix that the stored numbers mean, exactly as a reader computing in float32 finds it."""
    if isinstance(form, Dense):
        return form.weight.float()
    scale = decode(form.scale)
    values = form.codes.float() if form.levels is None else form.levels.float()[form.codes.int()]
    if isinstance(form.block, int):
        values *= scale.flatten().repeat_interleave(form.block)[: values.numel()].view(values.shape)
    else:
        rows, cols = form.block
        out, width = values.shape
        tiled = values.view(out // rows, rows, width // cols, cols)
        if form.zero is not None:
            tiled -= form.zero.float()[:, None, :, None]
        tiled *= scale[:, None, :, None]
    return values if form.offset is None else values.add_(form.offset.float())


def check_blocks(form: Form) -> None:
    """Raise ValueError where the scales of a form, or its zero points, do not cover its codes."""
    if isinstance(form, Dense):
        return
    check_blocks(form.scale)
    if isinstance(form.block, int):
        wanted: tuple[int, ...] = (-(-form.codes.numel() // form.block),)
    else:
        wanted = (form.codes.shape[0] // form.block[0], form.codes.shape[1] // form.block[1])
    found = tuple(form.scale.codes.shape if isinstance(form.scale, Quantized) else form.scale.weight.shape)
    whole = isinstance(form.block, int) or all(n % b == 0 for n, b in zip(form.codes.shape, form.block, strict=True))
    if not whole or found != wanted or (form.zero is not None and tuple(form.zero.shape) != wanted):
        raise ValueError(f"scales {list(found)} do not cover codes {list(form.codes.shape)} in blocks of {form.block}")


def without_data(form: Form) -> Form:
    """The same form on the `meta` device; tables of levels keep their values, by which formats tell kinds apart."""
    if isinstance(form, Dense):
        return Dense(form.weight.to("meta"))
    zero = None if form.zero is None else form.zero.to("meta")
    return replace(form, codes=form.codes.to("meta"), scale=without_data(form.scale), zero=zero)


def split_rows(layer: Layer, rows: list[int]) -> list[Layer]:
    """The results of matrices that were compressed stacked on top of each other, `rows` [out] of each."""
    form, objective = layer.weight, layer.objective
    objectives: list[Objective | None] = [None] * len(rows)
    if objective is not None:
        halves = zip(torch.split(objective.own, rows), torch.split(objective.baseline, rows), strict=True)
        objectives = [Objective(own, baseline) for own, baseline in halves]
    if isinstance(form, Dense):
        forms: list[Form] = [Dense(part) for part in torch.split(form.weight, rows)]
    elif not _by_row(form) or not isinstance(form.scale, Dense):
        raise ValueError("scales that span rows cannot be split by rows")
    else:
        zeros: Sequence[Tensor | None] = [None] * len(rows) if form.zero is None else torch.split(form.zero, rows)
        parts = zip(torch.split(form.codes, rows), torch.split(form.scale.weight, rows), zeros, strict=True)
        forms = [replace(form, codes=c, scale=Dense(s), zero=z) for c, s, z in parts]
    return [replace(layer, weight=f, objective=o) for f, o in zip(forms, objectives, strict=True)]


def join_rows(layers: list[Layer]) -> Layer:
    """The result of a matrix that was compressed in stretches of rows: the inverse of `split_rows`; events once."""
    forms = [layer.weight for layer in layers]
    known = [layer.objective for layer in layers if layer.objective is not None]
    objective = Objective(torch.cat([o.own for o in known]), torch.cat([o.baseline for o in known])) if known else None
    dense = [form for form in forms if isinstance(form, Dense)]
    if dense:
        return replace(layers[0], weight=Dense(torch.cat([form.weight for form in dense])), objective=objective)
    parts = [form for form in forms if isinstance(form, Quantized)]
    scales = [form.scale.weight for form in parts if isinstance(form.scale, Dense) and _by_row(form)]
    if len(scales) < len(forms):
        raise ValueError("scales that span rows cannot be joined by rows")
    zeros = [form.zero for form in parts if form.zero is not None]
    form = replace(
        parts[0],
        codes=torch.cat([form.codes for form in parts]),
        scale=Dense(torch.cat(scales)),
        zero=torch.cat(zeros) if zeros else None,
    )
    return replace(layers[0], weight=form, objective=objective)


def _by_row(form: Quantized) -> bool:
    return not isinstance(form.block, int) and form.block[0] == 1


def finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite: one pass, without a mask of the tensor's size."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    values = tensor.float() if tensor.itemsize == 1 else tensor  # torch compares no float8
    return all(bool(torch.isfinite(value)) for value in torch.aminmax(values))


def relative_error(original: Tensor, decoded: Tensor) -> float:
    """||W - Q|| / ||W||, Frobenius, summed in float64: the same number whoever computes it."""
    norm = rest = 0.0
    for w, q in zip(torch.split(original, ROWS), torch.split(decoded, ROWS), strict=True):
        exact = w.to(torch.float64, copy=True)  # a float64 matrix may be mapped from its file
        norm += float(exact.square().sum())
        rest += float(exact.sub_(q).square().sum())
    return (rest / norm) ** 0.5 if norm else 0.0


__all__ = [
    "check_blocks",
    "Dense",
    "Event",
    "Form",
    "InputScheme",
    "Layer",
    "Objective",
    "Quantized",
    "Scheme",
    "decode",
    "join_rows",
    "relative_error",
    "split_rows",
    "without_data",
]
