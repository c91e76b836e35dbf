"""What rewrites weights and leaves the function as it is, one file each; the file's name is that in a recipe."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmshrink.transforms.base import Transform

# Modules of this folder that no recipe names as a transform.
_SUPPORT = {"base", "rotation"}


def transform_names() -> list[str]:
    """Names a recipe may use, from the file names: imports nothing."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _SUPPORT)


def load_transform(name: str) -> type[Transform[Any]]:
    """The class of one transform; imports its file (and torch) only now.

    Raises:
        KeyError: there is no such transform.
    """
    if name not in transform_names():
        raise KeyError(name)
    found: type[Transform[Any]] = import_module(f"llmshrink.transforms.{name}").TRANSFORM
    return found
