"""What lies in an output folder beside the shards: configuration, tokenizer, index or GGUF file, report, card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llmshrink.engine.compress import Result
from llmshrink.engine.workspace import Workspace
from llmshrink.formats import entropy
from llmshrink.formats.own import OwnFormat, packed_config
from llmshrink.gguf.checkpoint import SINGLE
from llmshrink.io.files import copy_file, write_bytes, write_json
from llmshrink.io.safetensors import INDEX, Checkpoint, read_header, write
from llmshrink.plan.work import Work
from llmshrink.recipe import text
from llmshrink.recipe.schema import Recipe
from llmshrink.report.card import model_card
from llmshrink.report.curve import picture, table
from llmshrink.report.rows import course_names
from llmshrink.report.schema import LayerReport, PackReport, Report
from llmshrink.summary import plain


def save_companions(work: Work, folder: Path) -> dict[str, str]:
    """Config, tokenizer and generation files: written before compute, so that no run fails at its end for them.

    Returns:
        The SHA-256 of each; of those that are copied, of the source.
    """
    source = work.model.source
    files = work.format.files(work.quantization_config)
    written = {name: write_json(folder / name, content) for name, content in files.items()}
    written["config.json"] = _write_config(work, folder, work.quantization_config)
    for name, path in source.companions.items():
        copy_file(path, folder / name)
        written[name] = source.hashes[name]
    return written


def _write_config(work: Work, folder: Path, quantization: dict[str, Any] | None) -> str:
    config = {name: value for name, value in work.model.source.config_dict.items() if name != "quantization_config"}
    if quantization is not None:
        config["quantization_config"] = quantization
    return write_json(folder / "config.json", config)


def finish_files(work: Work, workspace: Workspace, result: Result) -> dict[str, str]:
    """Make of the shards what loaders take; returns the SHA-256 of every file of the output that it wrote."""
    if work.blueprint is not None:
        headers = (read_header(workspace.work / name) for name in work.shards.values())
        checkpoint = Checkpoint(workspace.work, {name: info for header in headers for name, info in header.items()})
        return {SINGLE: work.blueprint.write(workspace.folder / SINGLE, checkpoint.get)}
    packer = Packer(work) if work.pack else None
    files = result.files
    if work.apart:
        files = {name: _merge(workspace, name, result.replaced, packer) for name in work.shards.values()}
    if packer is not None:
        files["config.json"] = _write_config(work, workspace.folder, packer.config)
        result.layers, result.packed = packer.told(result.layers), packer.report
    return {**files, INDEX: _write_index(work, workspace.folder)}


def _merge(workspace: Workspace, name: str, replaced: Mapping[str, Tensor], packer: Packer | None) -> str:
    """Write a shard with what was tuned in it, or its codes packed; returns its SHA-256."""
    shard = Checkpoint(workspace.work, read_header(workspace.work / name))
    tensors = {key: replaced.get(key, shard.get(key)) for key in shard.infos}
    if packer is not None:
        tensors = {key: packer.pack(key, tensor) for key, tensor in tensors.items()}
    return write(workspace.folder / name, tensors)


@dataclass
class Packer:
    """Entropy-codes the codes of a model that is written, and knows what that gained.

    Attributes:
        sizes: Bytes of the tensors that are packed, by their names.
        plain: Bytes that each tensor of codes had before.
    """

    work: Work
    sizes: dict[str, int] = field(default_factory=dict)
    plain: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fmt, self._config = self.work.format, self.work.quantization_config or {}
        assert isinstance(fmt, OwnFormat)
        self._bits = fmt.code_bits(self._config)

    def pack(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor as it is written: codes in fewer bytes, if there are fewer."""
        if name not in self._bits:
            return tensor
        self.plain[name] = len(tensor)
        packed = entropy.pack(tensor, self._bits[name])
        if packed is None:
            return tensor
        self.sizes[name] = len(packed)
        return packed

    @property
    def config(self) -> dict[str, Any]:
        """The settings that say what is packed."""
        return packed_config(self._config, self.sizes)

    @property
    def report(self) -> PackReport:
        """What all that gained."""
        before = sum(self.plain.values())
        return PackReport(
            codec=entropy.CODEC,
            tensors=len(self.sizes),
            plain=len(self.plain) - len(self.sizes),
            bytes_before=before,
            bytes_after=before - sum(self.plain[name] - size for name, size in self.sizes.items()),
        )

    def told(self, layers: list[LayerReport]) -> list[LayerReport]:
        """The layers with the bytes that they have now."""
        gained: dict[str, int] = {}
        for name, size in self.sizes.items():
            owner = name[: name.rindex(".weight")]
            gained[owner] = gained.get(owner, 0) + self.plain[name] - size
        return [
            layer.model_copy(update={"bytes_after": size, "bits_per_weight": 8 * size / layer.parameters})
            for layer in layers
            for size in [layer.bytes_after - gained.get(layer.name, 0)]
        ]


def write_report(folder: Path, report: Report, recipe: Recipe) -> None:
    """The resolved recipe, the model card, the report itself, and the course of each training, as picture and table."""
    for number, name in course_names(report).items():
        trained = report.stages[number - 1].trained
        assert trained is not None
        write_bytes(folder / f"{name}.png", picture(trained))
        write_bytes(folder / f"{name}.csv", table(trained).encode())
    write_bytes(folder / "recipe.yaml", text.write(plain(recipe)).encode())
    write_bytes(folder / "README.md", model_card(report, text.write(plain(_shareable(recipe)))).encode())
    write_bytes(folder / "report.json", (report.model_dump_json(indent=2, ensure_ascii=True) + "\n").encode())


def _write_index(work: Work, folder: Path) -> str:
    infos = {name: info for file in work.shards.values() for name, info in read_header(folder / file).items()}
    weight_map = {name: info.file for name, info in sorted(infos.items())}
    total = sum(info.bytes for info in infos.values())
    return write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shareable(recipe: Recipe) -> Recipe:
    """The recipe without this machine's paths: the card is what people upload."""

    def bare(name: str) -> str:
        return Path(name).name if Path(name).expanduser().exists() else name

    data = json.loads(recipe.model_dump_json())
    for stage in data["stages"]:
        if stage.get("teacher"):
            stage["teacher"] = bare(stage["teacher"])
        if stage.get("train"):
            stage["train"]["data"] = bare(stage["train"]["data"])
    data["output"] = None
    data["model"]["id"] = data["model"]["id"] and bare(data["model"]["id"])
    data["calibration"]["data"] = bare(data["calibration"]["data"])
    data["evaluation"]["data"] = [bare(name) for name in data["evaluation"]["data"]]
    return recipe.model_validate(data)
