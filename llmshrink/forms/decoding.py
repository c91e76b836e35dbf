"""What a form means, and whether its parts fit each other."""

from __future__ import annotations

import torch
from torch import Tensor

from llmshrink.forms.kinds import Codebook, Dense, Form, LowRank, Quantized, Scattered, Sparse, Sum


def decode(form: Form) -> Tensor:
    """The float32 matrix that the stored numbers mean, exactly as a reader computing in float32 finds it."""
    if isinstance(form, Dense):
        return form.weight.float()
    if isinstance(form, Sparse):
        return decode(form.values).masked_fill(~form.mask, 0)
    if isinstance(form, Codebook):
        return form.values()
    if isinstance(form, Scattered):
        return form.weight()
    if isinstance(form, LowRank):
        return _product(form)
    if isinstance(form, Sum):
        first, *others = form.parts
        total = decode(first).clone()  # which may lie in a file
        for part in others:
            total += decode(part)
        return total
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


def applied(form: Form, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """What a linear with this weight makes of inputs [..., in]: [..., out] in their dtype. No product is formed."""
    if isinstance(form, Sum) and isinstance(form.parts[0], LowRank):
        first, *others = form.parts
        return sum((applied(part, x) for part in others), applied(first, x, bias))
    if not isinstance(form, LowRank):
        weight = form.weight if isinstance(form, Dense) else decode(form)
        return torch.nn.functional.linear(x, weight.to(x.dtype), bias)
    inner = applied(form.right, x)
    if form.pivots is None:
        return applied(form.left, inner, bias)
    product = applied(form.left, inner)
    whole = inner.new_empty((*inner.shape[:-1], len(form.pivots)))
    whole[..., form.pivots], whole[..., ~form.pivots] = inner[..., form.own], product
    return whole if bias is None else whole.add_(bias)


def check_blocks(form: Form) -> None:
    """Raise ValueError where the scales of a form, its zero points or its minima, do not cover its codes."""
    if isinstance(form, Dense):
        return
    if isinstance(form, Codebook):
        if len(form.codes) % len(form.table):
            raise ValueError(f"{len(form.table)} tables do not share {len(form.codes)} rows")
        if form.scale is not None and len(form.scale) != len(form.codes):
            raise ValueError(f"{len(form.scale)} scales are not those of {len(form.codes)} rows")
        return
    if isinstance(form, Scattered):
        if len(form.columns) != len(form.values) or not _counts(form.counts, len(form.values)):
            raise ValueError(f"{len(form.values)} values are not those of {len(form.columns)} places")
        return
    if isinstance(form, LowRank):
        _check_factors(form)
        return
    if isinstance(form, Sum):
        shapes = [list(shape_of(part)) for part in form.parts]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"parts {shapes} have no sum")
        for part in form.parts:
            check_blocks(part)
        return
    if isinstance(form, Sparse):
        if shape_of(form.values) != form.mask.shape:
            raise ValueError(f"values {list(shape_of(form.values))} under a mask {list(form.mask.shape)}")
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
        found = list(shape_of(table))
        if not whole or found != wanted or (form.zero is not None and list(form.zero.shape) != wanted):
            cut = f"codes {list(form.codes.shape)} in blocks of {form.block}"
            raise ValueError(f"{'scales' if table is form.scale else 'minima'} {found} do not cover {cut}")


def _check_factors(form: LowRank) -> None:
    """Raise ValueError where factors do not fit each other, or the pivots."""
    (left, inner), (rank, _) = shape_of(form.left), shape_of(form.right)
    if inner != rank:
        raise ValueError(f"factors {[left, inner]} and {list(shape_of(form.right))} have no product")
    if form.pivots is not None:
        own = form.own
        fewer = form.shared is not None and 0 <= own.start <= own.stop <= rank
        if not (fewer or own == slice(0, rank)) or not _counts(form.pivots, own.stop - own.start):
            raise ValueError(f"{rank} rows of a factor are not those that stand for {len(form.pivots)} rows")
    check_blocks(form.left)
    check_blocks(form.right)


def _counts(numbers: Tensor, total: int) -> bool:
    return numbers.is_meta or int(numbers.sum()) == total


def _product(form: LowRank) -> Tensor:
    right = decode(form.right)
    if right.is_meta:
        return right.new_empty(shape_of(form))
    product = decode(form.left) @ right
    if form.pivots is None:
        return product
    whole = right.new_empty(len(form.pivots), right.shape[1])
    whole[form.pivots], whole[~form.pivots] = right[form.own], product
    return whole


def shape_of(form: Form) -> torch.Size:
    """Of the matrix that a form means: [out, in]."""
    if isinstance(form, Sparse):
        return form.mask.shape
    if isinstance(form, LowRank):
        rows = shape_of(form.left)[0] if form.pivots is None else len(form.pivots)
        return torch.Size((rows, shape_of(form.right)[1]))
    if isinstance(form, Sum):
        return shape_of(form.parts[0])
    if isinstance(form, Codebook | Scattered):
        return form.shape
    return form.codes.shape if isinstance(form, Quantized) else form.weight.shape
