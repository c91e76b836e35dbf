"""Checks of a finished folder without its source: every file as it was written, every tensor decoded, a reader."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmshrink.checks.written import check_reader, probe_tokens
from llmshrink.engine.workspace import MANIFEST, WORK
from llmshrink.errors import InputError, PlanError, RecipeError, UnsafeError
from llmshrink.forms import finite
from llmshrink.io.files import has_hash
from llmshrink.io.safetensors import Checkpoint, read_header, refuse_outside
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.describe_adapter import NAME as ADAPTER
from llmshrink.progress import Progress
from llmshrink.recipe import load
from llmshrink.report.schema import Check, Report

# What people read and no loader does; the rest decides what the model computes.
DOCUMENTS = re.compile(r"README\.md|recipe\.yaml|report\.json|(LICENSE|LICENCE|NOTICE|USE_POLICY).*")
SHOWN = 3  # names in a check's detail


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    bytes: int = Field(ge=0)
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1]
    files: dict[str, _Entry]


def verify_folder(folder: Path, *, progress: Progress) -> list[Check]:
    """Everything that can be checked on a finished folder without its source.

    Raises:
        InputError: the folder is not an output of llmshrink, is not finished, or its manifest names files elsewhere.
        UnsafeError: a file is a link out of the folder.
    """
    _refuse_unfinished(folder)
    manifest, check = _read_manifest(folder / MANIFEST)
    if manifest is None:
        return [check]
    present = _present(folder)
    changed = _changed(present, manifest, progress)
    documents = {name for name in manifest.files if DOCUMENTS.fullmatch(name)}
    loaded = f"{len(manifest.files) - len(documents)} files of weights, configuration and tokenizer"
    spoiled = [name for name in changed if name not in documents]
    progress.start("verify", 0)
    checks = [
        check,
        _check_files(present, manifest),
        Check(name="hashes", passed=not spoiled, detail=_some("changed or missing", spoiled) if spoiled else loaded),
        _check_documents(folder, [name for name in changed if name in documents]),
        *(_not_run() if spoiled else _check_model(folder)),
    ]
    progress.finish()
    return checks


def _refuse_unfinished(folder: Path) -> None:
    partial = folder.with_name(folder.name + ".partial")
    unfinished = folder if (folder / WORK).is_dir() else partial if not folder.exists() else None
    committed = (folder / MANIFEST).is_file() and not folder.name.endswith(".partial")
    if unfinished is not None and (unfinished / WORK).is_dir() and not committed:
        raise InputError(
            f"{unfinished} is the work of a run that has not finished: there is nothing to verify yet.",
            hint="Give the command of that run again: it goes on after the last finished block.",
        )
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}.")
    if not (folder / MANIFEST).is_file():
        raise InputError(
            f"{folder} has no {MANIFEST}: it is not an output of llmshrink.",
            hint="`verify` checks what `quantize` and `export` wrote; `llmshrink eval` measures any model.",
        )


def _read_manifest(path: Path) -> tuple[_Manifest | None, Check]:
    """The manifest, and whether it is as it was written: what it lists is worth no more than itself.

    Raises:
        InputError: it names a file outside its folder.
    """
    raw = path.read_bytes()
    try:
        manifest = _Manifest.model_validate_json(raw)
    except ValidationError as error:
        return None, Check(name="manifest", passed=False, detail=f"{path.name} is damaged: {_first(error)}")
    for name in manifest.files:
        if Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name:
            raise InputError(f"{path} names a file outside its folder: {name!r}.")
    same = raw == (json.dumps(manifest.model_dump(), indent=2, ensure_ascii=False) + "\n").encode()
    detail = f"{len(manifest.files)} files listed" if same else f"{path.name} is not as it was written"
    return manifest, Check(name="manifest", passed=same, detail=detail)


def _present(folder: Path) -> dict[str, Path]:
    """Files by their names below the folder; what is hidden belongs to git, the Hub's client, or a killed run.

    Raises:
        UnsafeError: one is a link out of the folder, or lies behind one.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue
        refuse_outside(path)
        if path.is_file():
            found[name.as_posix()] = path
    return found


def _changed(present: dict[str, Path], manifest: _Manifest, progress: Progress) -> list[str]:
    """Files that are not there, or are not what was written."""
    progress.start("hash the files", sum(entry.bytes for entry in manifest.files.values()))
    found = []
    for name, entry in manifest.files.items():
        if name not in present or not has_hash(present[name], entry.sha256):
            found.append(name)
        progress.advance(entry.bytes, name)
    progress.finish()
    return found


def _check_files(present: dict[str, Path], manifest: _Manifest) -> Check:
    """Whether the folder holds what is listed, of the listed size, and nothing else that a loader could pick up."""
    missing = [name for name in manifest.files if name not in present]
    resized = [
        name
        for name, entry in manifest.files.items()
        if name in present and present[name].stat().st_size != entry.bytes
    ]
    unlisted = [name for name in present if name not in manifest.files and name != MANIFEST]
    faults = {"missing": missing, "of another size": resized, "not listed": unlisted}
    told = [_some(what, names) for what, names in faults.items() if names]
    return Check(name="files", passed=not told, detail="; ".join(told) or "all there, of their sizes, and no other")


def _check_documents(folder: Path, changed: list[str]) -> Check:
    """Whether the documents are as they were written, can be read, and tell of one recipe."""
    told = [_some("changed or missing", changed)] if changed else []
    try:
        report = Report.model_validate_json((folder / "report.json").read_bytes())
        recipe = str(folder / "recipe.yaml")
        load.load(recipe)
        if load.read(recipe) != report.recipe:
            told.append("recipe.yaml is not the recipe of report.json")
    except OSError as error:
        told.append(f"report.json: {error.strerror}")
    except ValidationError as error:
        told.append(f"report.json is no report: {_first(error)}")
    except (RecipeError, UnsafeError) as error:
        told.append(error.message)
    return Check(name="documents", passed=not told, detail="; ".join(told) or "report, recipe and model card")


def _first(error: ValidationError) -> str:
    found = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, found['loc']))} {found['msg']}".strip()


def _check_adapter(folder: Path) -> list[Check]:
    """Read every tensor of an adapter; without its model nothing can run it."""
    adapter = Checkpoint(folder, read_header(folder / ADAPTER))
    broken = [key for key in adapter.infos if not finite(adapter.get(key))]
    detail = f"{len(adapter.infos)} tensors" if not broken else _some("not finite", broken)
    reader = Check(name="reader", passed=None, detail="an adapter runs beside its model alone, which is not here")
    return [Check(name="decode", passed=not broken, detail=detail), reader]


def _check_model(folder: Path) -> list[Check]:
    """Decode every tensor, and load the folder with plain transformers."""
    if (folder / ADAPTER).is_file():
        return _check_adapter(folder)
    try:
        written = StreamedModel(open_source(str(folder)), torch.device("cpu"))
        broken = [key for key in written.weights.infos if not finite(written.weights.get(key))]
    except (InputError, PlanError) as error:
        return [Check(name="decode", passed=False, detail=error.message), _not_run()[1]]
    detail = f"{len(written.weights.infos)} tensors" if not broken else _some("not finite", broken)
    decode = Check(name="decode", passed=not broken, detail=detail)
    return [decode, check_reader(written, probe_tokens(written), written.anatomy.unused)]


def _not_run() -> list[Check]:
    detail = "its files are not what was written"
    return [Check(name=name, passed=None, detail=detail) for name in ("decode", "reader")]


def _some(what: str, names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    shown = ", ".join(sorted(names)[:SHOWN]).encode(errors="replace").decode()  # a name on disk need not be UTF-8
    return f"{what}: {shown}{more}"


__all__ = ["verify_folder"]
