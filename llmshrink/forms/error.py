"""How far what is stored is from what was there."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

ROWS = 256  # of a matrix that are compared at a time


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
