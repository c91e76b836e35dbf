"""From a file, a built-in name or overrides to a `Recipe`, with all problems told at once; and back to YAML."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unicodedata import category

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from llmshrink.errors import RecipeError, UnsafeError, UsageError
from llmshrink.formats.gguf_mix import SAID
from llmshrink.recipe import text
from llmshrink.recipe.distill import DistillStage
from llmshrink.recipe.lora import LoraStage
from llmshrink.recipe.method import MethodSpec
from llmshrink.recipe.schema import Recipe
from llmshrink.recipe.section import KeyPath, did_you_mean, unknown_key
from llmshrink.recipe.stages import (
    ClusterStage,
    CutStage,
    EvalStage,
    ExportStage,
    FactorizeStage,
    MatrixStage,
    PruneStage,
    QuantizeStage,
)

LONG = 100  # characters of a value or key that a message repeats
_STAGE_KEYS = {
    "quantize": set(QuantizeStage.model_fields),
    "prune": {*PruneStage.model_fields, *CutStage.model_fields},
    "cluster": set(ClusterStage.model_fields),
    "factorize": set(FactorizeStage.model_fields),
    "cut": set(CutStage.model_fields),
    "distill": set(DistillStage.model_fields),
    "lora": set(LoraStage.model_fields),
    "export": set(ExportStage.model_fields),
    "eval": set(EvalStage.model_fields),
}


def recipes_folder() -> Path:
    """The folder of the built-in recipes: inside an installed package, else beside it in a clone."""
    package = Path(__file__).parent.parent
    shipped = package / "_recipes"
    return shipped if shipped.is_dir() else package.parent / "recipes"


def built_in() -> dict[str, Path]:
    """Name -> file of every built-in recipe, e.g. `gptq-w4g128` -> `quantize/gptq-w4g128.yaml`."""
    return {path.stem: path for path in sorted(recipes_folder().rglob("*.yaml"), key=lambda p: p.stem)}


def summary(path: Path) -> str:
    """What a recipe says about itself: its second line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[1].removeprefix("# ") if len(lines) > 1 and lines[1].startswith("# ") else ""


def resolve_name(path_or_name: str) -> Path:
    """The file of a built-in recipe's name, or of a path.

    Raises:
        RecipeError: neither a built-in name nor a file.
    """
    known = built_in()
    if path_or_name in known:
        return known[path_or_name]
    path = Path(path_or_name)
    if path.is_file():
        return path
    if path.is_dir():
        raise RecipeError(f"{path_or_name} is a folder; a recipe is a YAML file")
    looks_like_path = path.suffix in {".yaml", ".yml"} or len(path.parts) > 1
    what = "no such file" if looks_like_path else "no built-in recipe of this name"
    raise RecipeError(f"{path_or_name}: {what}{did_you_mean(path.stem, known)}", hint="llmshrink recipes ls shows all")


def read_text(path: Path) -> str:
    """The text of a recipe's file.

    Raises:
        RecipeError: not readable, or not UTF-8.
        UnsafeError: megabytes.
    """
    try:
        with path.open("rb") as file:
            content = file.read(text.MAX_BYTES + 1)
        if len(content) > text.MAX_BYTES:
            raise UnsafeError(f"{path}: larger than {text.MAX_BYTES:,} bytes; a recipe is a page of text")
        return content.decode()
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from None


def read(path_or_name: str) -> dict[str, Any]:
    """The plain data of a recipe, not validated yet.

    Raises:
        RecipeError: no such recipe, not readable, not YAML, or not a mapping.
        UnsafeError: tags, or more than the limits of `text` allow.
    """
    path = resolve_name(path_or_name)
    data = text.parse(read_text(path), str(path))
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping that begins with `version: 1`")
    return data


def load(path_or_name: str) -> Recipe:
    """Read and validate a recipe.

    Raises:
        RecipeError: it cannot be read, or does not validate; `problems` holds every fault.
    """
    return validate(read(path_or_name), origin=path_or_name)


def validate(data: Mapping[str, Any], origin: str = "recipe") -> Recipe:
    """A `Recipe` from plain data.

    Raises:
        RecipeError: `problems` holds one line for each fault, with its path and the nearest known word.
        UnsafeError: a text holds control characters, which a terminal or a path could take for something else.
    """
    _refuse_controls(data, (), origin)
    try:
        return Recipe.model_validate(dict(data))
    except ValidationError as error:
        problems = [_problem(found) for found in error.errors(include_url=False)]
    raise RecipeError(f"{origin}: {len(problems)} problem{'s' * (len(problems) > 1)}", problems)


def override(data: Mapping[str, Any], path: str, value: Any, *, task: str | None = None) -> dict[str, Any]:
    """A copy of a recipe's data with one value changed; a mapping that is missing on the way is made.

    Args:
        data: plain data, not validated; the result is not validated either.
        path: such as `calibration.data`; where one stage alone has the key, `stages.N.` may be left out.
        value: plain data.
        task: of the stage that is meant where several have the key; None: that is a fault.

    Raises:
        RecipeError: no recipe has this path.
    """
    result = copy.deepcopy(dict(data))
    place: Any = result
    keys = _full_path(path, result, task)
    for depth, key in enumerate(keys):
        index: str | int = key
        if isinstance(place, list):
            if not key.isdecimal() or int(key) >= len(place):
                raise RecipeError(f"{path}: '{key}' is not one of 0..{len(place) - 1}")
            index = int(key)
        elif not isinstance(place, dict):
            raise RecipeError(f"{path}: there is nothing below {'.'.join(keys[:depth])}")
        elif depth < len(keys) - 1 and place.get(key) is None:
            place[key] = {}
        if depth == len(keys) - 1:
            place[index] = value
        else:
            place = place[index]
    return result


def apply_overrides(data: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A copy of a recipe's data under settings such as `method.bits=3`, whose values are YAML; see `override`.

    Raises:
        UsageError: a setting that is not `path=value`.
        RecipeError: no recipe has this path, or the value is not YAML.
    """
    result = dict(data)
    for setting in settings:
        path, equals, value = setting.partition("=")
        if not (equals and path):
            raise UsageError("--set: write it as path=value, e.g. --set method.bits=3")
        result = override(result, path, text.parse(value, f"--set {path}"))
    return result


def dump(recipe: Recipe) -> str:
    """The recipe as YAML with all defaults written out, in the order of the models; it validates to the same run."""
    return text.write(complete(recipe))


def complete(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data with all defaults written out."""
    data = recipe.model_dump(mode="json")
    for stage, plain in zip(recipe.stages, data["stages"], strict=True):
        if isinstance(stage, MatrixStage):
            plain["on_indivisible"] = stage.indivisible
            plain["method"] = stage.method and _settings(stage, stage.method)
            plain["transform"] = [spec.complete() for spec in stage.transform]
        if isinstance(stage, DistillStage) and stage.qat is not None:
            plain["qat"]["method"] = stage.qat.method.complete()
            plain["qat"]["on_indivisible"] = stage.qat.stage.indivisible
    return data


def _settings(stage: MatrixStage, method: MethodSpec) -> dict[str, Any]:
    """A method with its defaults, but for those of what a mix of GGUF types says."""
    said = SAID - method.settings.keys() if stage.format is not None and stage.format.name == "gguf" else set()
    return {key: value for key, value in method.complete().items() if key not in said}


def decisive(recipe: Recipe) -> dict[str, Any]:
    """What decides the compressed weights: not the output, the evaluation, the gates, or the machine."""
    data = complete(recipe)
    return {
        "model": data["model"],
        "stages": [{key: value for key, value in stage.items() if key != "gate"} for stage in data["stages"]],
        "calibration": data["calibration"],
        "run": {key: data["run"][key] for key in ("sequential", "batch_tokens")},
    }


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 (hex) of what is decisive."""
    return hashlib.sha256(json.dumps(decisive(recipe), sort_keys=True).encode()).hexdigest()


def _refuse_controls(value: Any, at: KeyPath, origin: str) -> None:
    if isinstance(value, Mapping):
        for key, below in value.items():
            _refuse_controls(str(key), (*at, key), origin)
            _refuse_controls(below, (*at, key), origin)
    elif isinstance(value, list):
        for index, below in enumerate(value):
            _refuse_controls(below, (*at, index), origin)
    elif isinstance(value, str) and any(category(c) in ("Cc", "Cs") and c not in "\n\t" for c in value):
        raise UnsafeError(f"{origin}: {_dotted(at)}: control characters in {value[:LONG]!r}")


def _problem(found: ErrorDetails) -> str:
    """One line: path, what is wrong, and the value where that helps."""
    at, value = found["loc"], found["input"]
    if at[:1] == ("stages",) and len(at) > 2 and at[2] in _STAGE_KEYS:  # the union's branch, which pydantic adds
        at = (*at[:2], *at[3:])
    got = f"; got {_short(repr(value))}" if "Input" in found["msg"] and isinstance(value, int | float | str) else ""
    return f"{_dotted(at)}: {found['msg']}{got}" if at else found["msg"]


def _dotted(at: KeyPath) -> str:
    words = ""
    for key in at:
        plain = isinstance(key, str) and re.fullmatch(r"[\w-]+", key)
        words += (f".{_short(str(key))}" if words else f"{_short(str(key))}") if plain else f"[{_short(repr(key))}]"
    return words


def _short(text: str) -> str:
    return text if len(text) <= LONG else f"{text[:LONG]}..."


def _full_path(path: str, data: Mapping[str, Any], task: str | None) -> list[str]:
    keys = re.sub(r"\[(\d+)\]", r".\1", path).split(".")
    if keys[0] in Recipe.model_fields:
        return keys
    stages = data.get("stages")
    tasks = [s.get("task") for s in stages if isinstance(s, dict)] if isinstance(stages, list) else []
    known = {name for stage, names in _STAGE_KEYS.items() if stage in tasks for name in names}
    if keys[0] not in known:
        raise RecipeError(f"{path}: {unknown_key(keys[0], known | set(Recipe.model_fields))}")
    having = [i for i, stage in enumerate(tasks) if keys[0] in _STAGE_KEYS.get(str(stage), ())]
    if tasks.count(task) == 1:
        having = [i for i in having if tasks[i] == task] or having
    if len(having) > 1:
        shown = ", ".join(f"stages.{i}.{path}" for i in having)
        raise RecipeError(f"{path}: several stages have this key; write {shown}")
    return ["stages", str(having[0]), *keys]
