"""Whether an adapter is for a model: by the weights that it learned beside where these are told, else by their name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmshrink.errors import InputError
from llmshrink.model.source import Source
from llmshrink.report.schema import Report

WEIGHTS = (".safetensors", ".gguf")


def check_base(folder: Path, said: dict[str, Any], report: Report | None, own: Path, source: Source) -> None:
    """Refuse an adapter that is known to be for another model, or for another task than to predict the next token.

    Args:
        folder: of the adapter.
        said: its settings.
        report: of the run that made it; None: there is none.
        own: where its own base lies, if it has one.
        source: the model that it is to stand beside.

    Raises:
        InputError: it is for something else.
    """
    if (task := said.get("task_type")) not in (None, "CAUSAL_LM"):
        raise InputError(f"{folder} does not predict the next token: its task is {task}.")
    if own.is_dir():
        if source.folder != own.resolve():
            raise InputError(f"{folder} is for a model of its own, and not for {source.id}.", hint=f"Name {own}.")
        return
    name = said.get("base_model_name_or_path")
    known = {} if report is None else _weights(report.model.files)
    if known:
        same = sorted(known.values()) == sorted(_weights(source.hashes).values())
        why = "its weights are not those that it learned beside"
    else:
        same = not name or _same_name(str(name), said.get("revision") is not None, source)
        why = f"if both are one, write this name into its {folder / 'adapter_config.json'}"
    if not same:
        raise InputError(f"{folder} is for another model, {name}, and not for {source.id}: {why}.")


def _weights(files: dict[str, str]) -> dict[str, str]:
    return {name: found for name, found in files.items() if name.endswith(WEIGHTS)}


def _same_name(said: str, hub: bool, source: Source) -> bool:
    """Whether two names may be of one model: a path, a bare folder or an id; `hub`: what is said is an id."""
    if hub and source.commit is not None:
        return said == source.id
    return not _names(Path(said)).isdisjoint(_names(Path(source.id)) | _names(source.folder))


def _names(path: Path) -> set[str]:
    """The last part of a path or an id; of a folder in the Hub's cache that of the id."""
    cached = {part.rpartition("--")[2] for part in path.parts if part.startswith("models--")}
    return cached or {path.name}


__all__ = ["check_base"]
