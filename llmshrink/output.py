"""What lies in an output folder beside the shards: configuration, tokenizer, index or GGUF file, report, card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from llmshrink.engine.compress import Result
from llmshrink.engine.workspace import Workspace
from llmshrink.gguf.checkpoint import SINGLE
from llmshrink.io.files import copy_file, write_bytes, write_json
from llmshrink.io.safetensors import INDEX, Checkpoint, read_header, write
from llmshrink.plan.work import Work
from llmshrink.recipe import text
from llmshrink.recipe.schema import Recipe
from llmshrink.report.card import model_card
from llmshrink.report.schema import Report
from llmshrink.summary import plain


def save_companions(work: Work, folder: Path) -> dict[str, str]:
    """Config, tokenizer and generation files: written before compute, so that no run fails at its end for them.

    Returns:
        The SHA-256 of each; of those that are copied, of the source.
    """
    source = work.model.source
    config = {name: value for name, value in source.config_dict.items() if name != "quantization_config"}
    if work.quantization_config is not None:
        config["quantization_config"] = work.quantization_config
    files = {"config.json": config, **work.format.files(work.quantization_config)}
    written = {name: write_json(folder / name, content) for name, content in files.items()}
    for name, path in source.companions.items():
        copy_file(path, folder / name)
        written[name] = source.hashes[name]
    return written


def finish_files(work: Work, workspace: Workspace, result: Result) -> dict[str, str]:
    """Make of the shards what loaders take; returns the SHA-256 of every file of the output."""
    if work.tune is not None:
        files = {name: _merge(workspace, name, result.replaced) for name in work.shards.values()}
        return {**files, INDEX: _write_index(work, workspace.folder)}
    if work.blueprint is None:
        return {**result.files, INDEX: _write_index(work, workspace.folder)}
    headers = (read_header(workspace.work / name) for name in work.shards.values())
    checkpoint = Checkpoint(workspace.work, {name: info for header in headers for name, info in header.items()})
    return {SINGLE: work.blueprint.write(workspace.folder / SINGLE, checkpoint.get)}


def _merge(workspace: Workspace, name: str, replaced: Mapping[str, Tensor]) -> str:
    """Write a shard with what was tuned in it; returns its SHA-256."""
    shard = Checkpoint(workspace.work, read_header(workspace.work / name))
    return write(workspace.folder / name, {key: replaced.get(key, shard.get(key)) for key in shard.infos})


def write_report(folder: Path, report: Report, recipe: Recipe) -> None:
    """The resolved recipe, the model card and the report itself."""
    write_bytes(folder / "recipe.yaml", text.write(plain(recipe)).encode())
    write_bytes(folder / "README.md", model_card(report, text.write(plain(_shareable(recipe)))).encode())
    write_bytes(folder / "report.json", (report.model_dump_json(indent=2, ensure_ascii=True) + "\n").encode())


def _write_index(work: Work, folder: Path) -> str:
    tensors = {work.shards[part.index]: work.meta_tensors(part) for part in work.parts}
    weight_map = {name: file for file, found in tensors.items() for name in found}
    total = sum(tensor.nbytes for found in tensors.values() for tensor in found.values())
    return write_json(
        folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    )


def _shareable(recipe: Recipe) -> Recipe:
    """The recipe without this machine's paths: the card is what people upload."""

    def bare(name: str) -> str:
        return Path(name).name if Path(name).expanduser().exists() else name

    data = json.loads(recipe.model_dump_json())
    data["output"] = None
    data["model"]["id"] = data["model"]["id"] and bare(data["model"]["id"])
    data["calibration"]["data"] = bare(data["calibration"]["data"])
    data["evaluation"]["data"] = [bare(name) for name in data["evaluation"]["data"]]
    return recipe.model_validate(data)
