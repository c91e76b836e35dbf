"""What a compression method may return: a small closed set of frozen forms that nest.

A form holds what is STORED: codes as integers, scales already rounded to the dtype they are written in. `decode`
gives back the float32 matrix that the stored numbers mean, so that "the error of the file" and "the error of the
method" are the same thing. Formats pack forms into tensors and back; methods make them; neither knows the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

LOOKED_UP = 1 << 20  # codes that are looked up at a time
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

    A weight means `scale * (code - zero)`, or `scale * levels[code]` where a table of levels is given; `minimum`, where
    there is one, is subtracted from that.
    """

    codes: Tensor  # [out, in]; int8 in [-2^(bits-1), 2^(bits-1)-1], uint8 from 0 or into `levels`, or float8_e4m3fn
    scale: Form  # decodes to [out / rows, in / cols], or [ceil(out * in / block)]
    zero: Tensor | None  # int8, the shape of the scales, signed like the codes; None: symmetric
    levels: Tensor | None  # float32, one for each code, None for an even grid
    block: tuple[int, int] | int
    bits: int
    offset: Tensor | None = None  # float32 scalar added to what the codes mean (the mean of a nested scale table)
    minimum: Form | None = None  # the shape of the scales; None: nothing is subtracted

    @property
    def scheme(self) -> Scheme | None:
        """What a loader must be told to decode it; None for levels, minima, nested scales and ones of some rows."""
        plain = self.levels is None and self.minimum is None and isinstance(self.scale, Dense)
        if not plain or isinstance(self.block, int):
            return None
        (rows, size), (out, width) = self.block, self.codes.shape
        whole = (rows, size) == (out, width) and out > 1
        if rows != 1 and not whole:
            return None
        kind: CodeKind = "float" if self.codes.is_floating_point() else "int"
        return Scheme(self.bits, self.zero is None, None if size == width else size, kind, whole)

    def to(self, device: torch.device) -> Quantized:
        """The same form on a device."""
        moved = combine([self], lambda tensors: tensors[0].to(device))
        assert isinstance(moved, Quantized)
        return moved

    @property
    def learnable(self) -> bool:
        """Whether codes are integers, and mean even steps of a scale that belongs to a stretch of a row."""
        even = self.levels is None and self.offset is None and not self.codes.is_floating_point()
        return even and not isinstance(self.block, int) and self.block[0] == 1


@dataclass(frozen=True)
class Sparse:
    """A form of which only some weights are stored; the others are zero."""

    mask: Tensor  # bool [out, in], true where a weight is kept
    values: Form  # of a matrix of that shape; what it says of the others is not stored
    kept: int  # how many weights are
    pattern: tuple[int, int] | None = None  # (n, m): n weights of each m adjacent inputs are kept; None: any


@dataclass(frozen=True)
class Codebook:
    """Codes into tables of values, which stretches of rows have in common."""

    codes: Tensor  # uint8 [out, in], below 2^bits
    table: Tensor  # [groups, 2^bits], as stored; the first out / groups rows share the first table
    bits: int

    def values(self) -> Tensor:
        """What the codes mean, float32 [out, in]."""
        groups, entries = self.table.shape
        values = torch.empty(self.codes.shape, dtype=torch.float32, device=self.codes.device)
        codes, found, table = (x.view(groups, -1) for x in (self.codes, values, self.table.float()))
        size = max(1, LOOKED_UP // codes.shape[1])
        for start in range(0, groups, size):  # an index is four times as large as a code
            part = slice(start, start + size)
            first = torch.arange(0, len(codes[part]) * entries, entries, dtype=torch.int32, device=codes.device)
            index = (codes[part].int() + first[:, None]).flatten()
            torch.index_select(table[part].flatten(), 0, index, out=found[part].view(-1))
        return values


Form = Dense | Quantized | Sparse | Codebook


@dataclass(frozen=True)
class InputScheme:
    """How the inputs of a linear are rounded to 8 bits before it multiplies them, symmetric around zero."""

    kind: InputKind
    scale: Tensor | None = None  # [1], in the dtype it is stored in; None: each token has its own (dynamic)
    threshold: float = 0.0  # of llm-int8: a feature in which a token reaches it is not rounded; 0: every feature is

    @property
    def words(self) -> str:
        """What it is, for a report."""
        kinds = {"int": "int8", "float": "fp8", "llm-int8": "LLM.int8", "bitnet": "BitNet"}
        return f"{kinds[self.kind]}, {'a scale for each token' if self.scale is None else 'a static scale'}"

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
    if isinstance(form, Sparse):
        return decode(form.values).masked_fill(~form.mask, 0)
    if isinstance(form, Codebook):
        return form.values()
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
        if form.minimum is not None:
            tiled -= decode(form.minimum)[:, None, :, None]
    return values if form.offset is None else values.add_(form.offset.float())


def check_blocks(form: Form) -> None:
    """Raise ValueError where the scales of a form, its zero points or its minima, do not cover its codes."""
    if isinstance(form, Dense):
        return
    if isinstance(form, Codebook):
        if len(form.codes) % len(form.table):
            raise ValueError(f"{len(form.table)} tables do not share {len(form.codes)} rows")
        return
    if isinstance(form, Sparse):
        if _shape(form.values) != form.mask.shape:
            raise ValueError(f"values {list(_shape(form.values))} under a mask {list(form.mask.shape)}")
        check_blocks(form.values)
        return
    if isinstance(form.block, int):
        whole, wanted = True, [-(-form.codes.numel() // form.block)]
    else:
        whole = all(n % b == 0 for n, b in zip(form.codes.shape, form.block, strict=True))
        wanted = [n // b for n, b in zip(form.codes.shape, form.block, strict=True)]
    for table in (form.scale, form.minimum):
        if table is None:
            continue
        check_blocks(table)
        found = list(_shape(table))
        if not whole or found != wanted or (form.zero is not None and list(form.zero.shape) != wanted):
            cut = f"codes {list(form.codes.shape)} in blocks of {form.block}"
            raise ValueError(f"{'scales' if table is form.scale else 'minima'} {found} do not cover {cut}")


def _shape(form: Form) -> torch.Size:
    if isinstance(form, Sparse):
        return form.mask.shape
    return form.codes.shape if isinstance(form, Quantized | Codebook) else form.weight.shape


def coded(form: Form) -> Quantized | Codebook | None:
    """The codes that a form is made of, all of them or those that are kept; None: it has none."""
    inner = filled(form)
    return inner if isinstance(inner, Quantized | Codebook) else None


def quantized(form: Form) -> Quantized | None:
    """The same, where they stand under scales."""
    inner = filled(form)
    return inner if isinstance(inner, Quantized) else None


def learnable(form: Form) -> bool:
    """Whether what is stored can be learned by gradient: floats, tables of values, or codes on an even grid."""
    inner = filled(form)
    return isinstance(inner, Dense | Codebook) or (isinstance(inner, Quantized) and inner.learnable)


def filled(form: Form) -> Form:
    """A form of all weights: what is dropped stands in the values as zeros already."""
    return form.values if isinstance(form, Sparse) else form


def combine(forms: Sequence[Form], how: Callable[[list[Tensor]], Tensor]) -> Form:
    """The form whose every tensor is what `how` makes of the tensors in its place in `forms`, all of one structure.

    Tables of levels and offsets belong to no row: they are those of the first.
    """
    first = forms[0]
    if isinstance(first, Dense):
        return Dense(how([form.weight for form in forms if isinstance(form, Dense)]))
    if isinstance(first, Sparse):
        parts = [form for form in forms if isinstance(form, Sparse)]
        mask = how([form.mask for form in parts])
        kept = sum(form.kept for form in parts) if mask.is_meta else int(mask.sum())
        return replace(first, mask=mask, values=combine([form.values for form in parts], how), kept=kept)
    if isinstance(first, Codebook):
        books = [form for form in forms if isinstance(form, Codebook)]
        return replace(first, codes=how([f.codes for f in books]), table=how([f.table for f in books]))
    alike = [form for form in forms if isinstance(form, Quantized)]
    zeros = [form.zero for form in alike if form.zero is not None]
    minima = [form.minimum for form in alike if form.minimum is not None]
    return replace(
        first,
        codes=how([form.codes for form in alike]),
        scale=combine([form.scale for form in alike], how),
        zero=how(zeros) if zeros else None,
        minimum=combine(minima, how) if minima else None,
    )


def without_data(form: Form) -> Form:
    """The same form on the `meta` device; tables of levels keep their values, by which formats tell kinds apart."""
    return combine([form], lambda tensors: tensors[0].to("meta"))


def split_rows(layer: Layer, rows: list[int]) -> list[Layer]:
    """The results of matrices that were compressed stacked on top of each other, `rows` [out] of each."""
    form, objective = layer.weight, layer.objective
    if not _by_row(form):
        raise ValueError("scales that span rows cannot be split by rows")

    def part(number: int) -> Layer:
        def cut(tensor: Tensor) -> Tensor:
            return torch.split(tensor, rows)[number]

        own = None if objective is None else Objective(cut(objective.own), cut(objective.baseline))
        return replace(layer, weight=combine([form], lambda tensors: cut(tensors[0])), objective=own)

    return [part(number) for number in range(len(rows))]


def join_rows(layers: list[Layer]) -> Layer:
    """The result of a matrix that was compressed in stretches of rows: the inverse of `split_rows`; events once."""
    if not all(_by_row(layer.weight) for layer in layers):
        raise ValueError("scales that span rows cannot be joined by rows")
    known = [layer.objective for layer in layers if layer.objective is not None]
    objective = Objective(torch.cat([o.own for o in known]), torch.cat([o.baseline for o in known])) if known else None
    return replace(layers[0], weight=combine([layer.weight for layer in layers], torch.cat), objective=objective)


def _by_row(form: Form) -> bool:
    """Whether each row of a form, and of the tables in it, stands for itself."""
    if isinstance(form, Dense):
        return True
    if isinstance(form, Sparse):
        return _by_row(form.values)
    if isinstance(form, Codebook):
        return False  # tables belong to stretches
    own = not isinstance(form.block, int) and form.block[0] == 1
    return own and _by_row(form.scale) and (form.minimum is None or _by_row(form.minimum))


def finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite: one pass, without a mask of the tensor's size."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    values = tensor.float() if tensor.itemsize == 1 else tensor  # torch compares no float8
    return all(bool(torch.isfinite(value)) for value in torch.aminmax(values))


def relative_error(original: Tensor, decoded: Tensor) -> float:
    """||W - Q|| / ||W||, Frobenius, summed in float64: the same number whoever computes it."""
    return relative_error_of([(original, decoded)])


def relative_error_of(stretches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The same for a matrix that comes in stretches of rows, each but the last of a multiple of `ROWS`."""
    norm = rest = 0.0
    for original, decoded in stretches:
        for w, q in zip(torch.split(original, ROWS), torch.split(decoded, ROWS), strict=True):
            exact = w.to(torch.float64, copy=True)  # a float64 matrix may be mapped from its file
            norm += float(exact.square().sum())
            rest += float(exact.sub_(q).square().sum())
    return (rest / norm) ** 0.5 if norm else 0.0


__all__ = [
    "check_blocks",
    "Codebook",
    "combine",
    "Dense",
    "Event",
    "Form",
    "InputScheme",
    "Layer",
    "Objective",
    "Quantized",
    "Scheme",
    "Sparse",
    "coded",
    "decode",
    "filled",
    "join_rows",
    "learnable",
    "quantized",
    "relative_error",
    "relative_error_of",
    "split_rows",
    "without_data",
]
