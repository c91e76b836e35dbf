"""Who may import whom: the folder tree is the architecture, and this holds it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "llmshrink"

# A part may import only the parts named here (and itself). `forms`, `errors` and the like are files of the top level.
ALLOWED = {
    "errors": set(),
    "forms": set(),
    "block_types": set(),
    "statistics": set(),
    "redact": set(),
    "patterns": {"errors"},
    "progress": {"forms"},
    "ranks": set(),
    "methods": {"block_types", "forms", "statistics"},
    "formats": {"block_types", "forms", "errors", "patterns"},
    "plugin": {"formats", "forms"},
    "io": {"errors"},
    "gguf": {"block_types", "errors", "io"},  # not `model`, which opens folders with GGUF files through it
    "transforms": {"statistics"},
    "recipe": {"errors", "methods", "formats", "patterns", "transforms"},
    "demo": set(),
    "model": {"errors", "forms", "formats", "gguf", "io", "memory", "transforms"},
    "memory": set(),
    "calibration": {"errors", "forms", "io", "memory", "model", "progress", "demo", "recipe"},
    "machine": {"errors", "forms", "memory", "progress", "ranks"},
    "allocate": set(),
    "plan": {
        "allocate",
        "block_types",
        "errors",
        "forms",
        "formats",
        "gguf",
        "io",
        "memory",
        "methods",
        "model",
        "patterns",
        "ranks",
        "recipe",
        "statistics",
        "transforms",
    },
    "engine": {
        "errors",
        "formats",
        "forms",
        "io",
        "memory",
        "methods",
        "model",
        "plan",
        "progress",
        "ranks",
        "recipe",
        "report",
        "statistics",
        "transforms",
    },
    "evaluate": {
        "bottleneck",
        "calibration",
        "engine",
        "errors",
        "formats",
        "forms",
        "gguf",
        "io",
        "memory",
        "model",
        "plan",
        "progress",
        "recipe",
        "report",
        "statistics",
    },
    "report": {"errors", "formats", "plan", "progress"},
    "summary": {
        "calibration",
        "engine",
        "evaluate",
        "forms",
        "formats",
        "machine",
        "memory",
        "model",
        "plan",
        "ranks",
        "recipe",
        "redact",
        "report",
    },
    "checks": {
        "engine",
        "errors",
        "evaluate",
        "formats",
        "gguf",
        "forms",
        "io",
        "memory",
        "model",
        "plan",
        "progress",
        "recipe",
        "report",
    },
    "adapters": None,  # a story of its own: several of them
    "cli": {"adapters", "errors", "progress", "ranks", "recipe", "redact", "report", "run", "forms", "plan"},
    "sensitivity": {
        "allocate",
        "calibration",
        "engine",
        "errors",
        "evaluate",
        "forms",
        "io",
        "memory",
        "methods",
        "model",
        "plan",
        "progress",
        "recipe",
        "report",
        "statistics",
        "summary",
    },
    "bottleneck": {"errors"},
    "train": {
        "bottleneck",
        "calibration",
        "engine",
        "errors",
        "evaluate",
        "formats",
        "forms",
        "io",
        "methods",
        "model",
        "plan",
        "progress",
        "ranks",
        "recipe",
        "report",
    },
    "adapting": None,  # the story of a run that ends in an adapter
    "distilling": None,  # the story of a run in which a student learns
    "output": {"formats", "engine", "gguf", "io", "plan", "recipe", "report", "summary"},
    "planning": {"checks", "demo", "engine", "errors", "model", "plan", "recipe"},
    "smoke": {"demo", "patterns", "plan", "recipe"},
    "pipeline": None,  # the story of several runs one behind the other
    "job": None,  # the story: it may import everything but the command line
    "run": None,
    "__init__": {"plugin"},
    "__main__": {"cli"},
}


def imports(path: Path) -> set[str]:
    """Parts of the package that a file imports, inside functions too; `llmshrink` itself is the version."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            parts = name.split(".")
            if parts[0] == "llmshrink" and len(parts) > 1:
                found.add(parts[1])
    return found


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_only_what_its_part_may(path: Path) -> None:
    part = part_of(path)
    found = imports(path) - {part}
    allowed = ALLOWED[part]
    assert "cli" not in found or part == "__main__"
    assert allowed is None or found <= allowed, f"{part} imports {sorted(found - allowed)}"


def test_methods_and_formats_do_not_know_each_other() -> None:
    for folder, other in (("methods", "formats"), ("formats", "methods")):
        for path in (PACKAGE / folder).glob("*.py"):
            assert other not in imports(path), path
