"""What a compression method may return: a small closed set of frozen forms that nest.

A form holds what is STORED: codes as integers, scales already rounded to the dtype they are written in. `decode`
gives back the float32 matrix that the stored numbers mean, so that "the error of the file" and "the error of the
method" are the same thing. Formats pack forms into tensors and back; methods make them; neither knows the other.
"""

from __future__ import annotations

from llmshrink.forms.decoding import applied, check_blocks, decode, shape_of
from llmshrink.forms.error import finite, relative_error, relative_error_of
from llmshrink.forms.inputs import LARGEST, LIMITS, InputScheme
from llmshrink.forms.kinds import (
    Codebook,
    CodeKind,
    Dense,
    Form,
    InputKind,
    LowRank,
    Quantized,
    Scattered,
    Scheme,
    Sparse,
    Sum,
)
from llmshrink.forms.layer import Event, Layer, Objective, join_rows, split_rows, stacked
from llmshrink.forms.parts import coded, combine, filled, learnable, low_rank, on, quantized, without_data

__all__ = [
    "Codebook",
    "CodeKind",
    "Dense",
    "Event",
    "Form",
    "InputKind",
    "InputScheme",
    "LARGEST",
    "LIMITS",
    "Layer",
    "LowRank",
    "Objective",
    "Quantized",
    "Scattered",
    "Scheme",
    "Sparse",
    "Sum",
    "applied",
    "check_blocks",
    "coded",
    "combine",
    "decode",
    "filled",
    "finite",
    "join_rows",
    "learnable",
    "low_rank",
    "on",
    "quantized",
    "relative_error",
    "relative_error_of",
    "shape_of",
    "split_rows",
    "stacked",
    "without_data",
]
