"""llmshrink: make a language model smaller, and prove what it cost."""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_QUANTIZERS = "transformers.quantizers.auto"


class _AfterImport:
    """Imports `llmshrink.plugin` as soon as transformers can take it; transformers itself is slow to import."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """What finds transformers' module of quantizers, and registers ours after it was run; None: another module."""
        if name != _QUANTIZERS or (spec := PathFinder.find_spec(name, path, target)) is None or spec.loader is None:
            return None
        sys.meta_path.remove(cls)
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register()

        setattr(spec.loader, "exec_module", run_and_register)  # noqa: B010 - of this one loader
        return spec


def _register() -> None:
    import llmshrink.plugin  # noqa: F401 - what it registers is what it is for


if _QUANTIZERS in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterImport)
