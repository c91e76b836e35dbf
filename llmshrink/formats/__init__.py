"""Checkpoint formats, one file each: pure pairs of form -> tensors and tensors -> form."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmshrink.formats.base import Format

# Modules of this folder that are not formats.
_SUPPORT = {"base", "bits", "entropy", "ggml", "gguf_mix", "own", "runtimes", "sets"}
_READ_ONLY = ("bitnet",)


def format_names() -> list[str]:
    """Names a recipe may use, of all that can be written, from the file names: imports nothing."""
    names = (m.name for m in pkgutil.iter_modules(__path__) if m.name not in {*_SUPPORT, *_READ_ONLY})
    return sorted(name.replace("_", "-") for name in names)


def load_format(name: str) -> Format:
    """One format; imports its file (and torch) only now.

    Raises:
        KeyError: there is no such format.
    """
    if name not in (*format_names(), *_READ_ONLY):
        raise KeyError(name)
    found: Format = import_module(f"llmshrink.formats.{name.replace('-', '_')}").FORMAT
    return found


def format_of(quantization: dict[str, Any] | None) -> Format | None:
    """The format of a checkpoint, from its `quantization_config`; None: quantized in a way that is not known here."""
    if quantization is None:
        return load_format("dense")
    for name in (*format_names(), *_READ_ONLY):
        candidate = load_format(name)
        if candidate.owns(quantization):
            return candidate
    return None
