"""Compression algorithms, one file each; the file's name is the method's name in a recipe."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmshrink.methods.base import Method

# Modules of this folder that no recipe names as a method.
_SUPPORT = {
    *("base", "basis", "blocks", "clusters", "codes", "cut", "even", "grid", "hessian", "inputs", "keep", "lowrank"),
    *("metric", "qat", "sparsity", "trained", "vectors"),
}


def method_names() -> list[str]:
    """Names a recipe may use, from the file names: imports nothing."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _SUPPORT)


def load_method(name: str) -> type[Method[Any]]:
    """The class of one method; imports its file (and torch) only now.

    Raises:
        KeyError: there is no such method.
    """
    if name not in method_names():
        raise KeyError(name)
    found: type[Method[Any]] = import_module(f"llmshrink.methods.{name}").METHOD
    return found


def by_weights(method: Method[Any]) -> Method[Any]:
    """The method that does the same from weights alone: its baseline, or itself where it looks at nothing else."""
    if method.baseline is None:
        return method.alone
    baseline = load_method(method.baseline)
    known = method.config.model_dump()
    config = baseline.Config(**{k: v for k, v in known.items() if k in baseline.Config.model_fields})
    return baseline(config, method.scales)
