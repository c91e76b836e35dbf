"""What a form is made of: its codes, its values, all of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from llmshrink.forms.kinds import Codebook, Dense, Form, LowRank, Quantized, Scattered, Sparse, Sum

F = TypeVar("F", bound=Form)


def coded(form: Form) -> Quantized | Codebook | None:
    """The codes that a form is made of, all of them or those that are kept; None: it has none."""
    inner = filled(form)
    parts = inner.parts if isinstance(inner, Sum) else (inner,)
    return next((part for part in parts if isinstance(part, Quantized | Codebook)), None)


def quantized(form: Form) -> Quantized | None:
    """The same, where they stand under scales."""
    inner = filled(form)
    return inner if isinstance(inner, Quantized) else None


def learnable(form: Form) -> bool:
    """Whether what is stored can be learned by gradient: floats, tables of values, or codes on an even grid."""
    inner = filled(form)
    if isinstance(inner, LowRank):
        return isinstance(inner.left, Dense) and isinstance(inner.right, Dense)
    if isinstance(inner, Sum):
        return any(learnable(part) for part in inner.parts)
    return isinstance(inner, Dense | Codebook) or (isinstance(inner, Quantized) and inner.learnable)


def low_rank(form: Form) -> LowRank | None:
    """The product that a form is, or that others are added to; None: it has none."""
    parts = form.parts if isinstance(form, Sum) else (form,)
    return next((part for part in parts if isinstance(part, LowRank)), None)


def filled(form: Form) -> Form:
    """A form of all weights: what is dropped stands in the values as zeros already."""
    return form.values if isinstance(form, Sparse) else form


def combine(forms: Sequence[Form], how: Callable[[list[Tensor]], Tensor]) -> Form:
    """The form whose every tensor is what `how` makes of the tensors in its place in `forms`, all of one structure.

    Tables of levels and offsets belong to no row: they are those of the first.
    """
    first = forms[0]
    if any(type(form) is not type(first) for form in forms):
        raise TypeError(f"forms of other kinds are not one: {sorted({type(form).__name__ for form in forms})}")
    if isinstance(first, Dense):
        return Dense(how([form.weight for form in forms if isinstance(form, Dense)]))
    if isinstance(first, Sparse):
        parts = [form for form in forms if isinstance(form, Sparse)]
        mask = how([form.mask for form in parts])
        kept = sum(form.kept for form in parts) if mask.is_meta else int(mask.sum())
        return replace(first, mask=mask, values=combine([form.values for form in parts], how), kept=kept)
    if isinstance(first, Codebook):
        books = [form for form in forms if isinstance(form, Codebook)]
        scales = [form.scale for form in books if form.scale is not None]
        codes, table = how([form.codes for form in books]), how([form.table for form in books])
        return replace(first, codes=codes, table=table, scale=how(scales) if scales else None)
    if isinstance(first, Scattered):
        apart = [form for form in forms if isinstance(form, Scattered)]
        values, columns, counts = (how([getattr(f, name) for f in apart]) for name in ("values", "columns", "counts"))
        return Scattered(values, columns, counts, first.width)
    if isinstance(first, LowRank):
        products = [form for form in forms if isinstance(form, LowRank)]
        pivots = [form.pivots for form in products if form.pivots is not None]
        left, right = (combine([getattr(form, name) for form in products], how) for name in ("left", "right"))
        return replace(products[0], left=left, right=right, pivots=how(pivots) if pivots else None)
    if isinstance(first, Sum):
        sums = [form.parts for form in forms if isinstance(form, Sum)]
        return Sum(tuple(combine(parts, how) for parts in zip(*sums, strict=True)))
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


def on(form: F, device: torch.device) -> F:
    """The same form on a device."""
    moved = combine([form], lambda tensors: tensors[0].to(device))
    assert isinstance(moved, type(form))
    return moved


def without_data(form: Form) -> Form:
    """The same form on the `meta` device; tables of levels keep their values, by which formats tell kinds apart."""
    return combine([form], lambda tensors: tensors[0].to("meta"))
