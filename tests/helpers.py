"""Recipes for tests, tensors of forms, and the dense model behind an output as llmshrink decodes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from llmshrink.engine.workspace import MANIFEST, WORK
from llmshrink.errors import InterruptedRun
from llmshrink.formats import entropy
from llmshrink.formats.base import Format, Slot
from llmshrink.formats.own import OwnFormat, packed_config
from llmshrink.forms import decode
from llmshrink.io.files import sha256
from llmshrink.methods import load_method, method_names
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.model.task import task_of
from llmshrink.plugin import Packed, TiedHead
from llmshrink.progress import Silent
from llmshrink.recipe.load import validate
from llmshrink.recipe.schema import Recipe
from llmshrink.report.schema import StageReport

ROUNDING = 1e-5  # of the spread of logits
FORMATS = {"cast": {"format": {"name": "gguf"}}}  # of methods that no other format stores


def recipe(model: Path, output: Path, text: Path, method: dict[str, Any] | None = None, **more: Any) -> Recipe:
    """A small recipe to quantize, or to prune where the method does, without evaluation."""
    usual = FORMATS.get(str((method or {}).get("name")), {})
    name = (method or {}).get("name")
    task = load_method(name).task if name in method_names() else "quantize"
    stage: dict[str, Any] = {"task": task, "method": method, **usual, **more.pop("stage", {})}
    data: dict[str, Any] = {
        "version": 1,
        "model": {"id": str(model)},
        "stages": [stage],
        "calibration": {"data": str(text), "samples": 12, "length": 48},
        "evaluation": {"data": [], "speed": False},
        "run": {"threads": 2, "batch_tokens": 192},
        "output": str(output),
    }
    for section, values in more.items():
        data[section] = {**data.get(section, {}), **values}
    return validate(data)


def decoded_model(folder: Path, original: Path) -> PreTrainedModel:
    """The original's class with the weights that llmshrink decodes from `folder`, float32."""
    streamed = StreamedModel(open_source(str(folder)), torch.device("cpu"))
    model = load(original)[0]
    kinds = {m.key: m.kind for m in streamed.anatomy.matrices}

    def get(key: str) -> torch.Tensor:  # some matrices are rounded to the checkpoint's dtype by the reader
        weights = streamed.weights
        return (weights.as_read(key, kinds[key]) if key in weights.compressed else weights.get(key)).float()

    state = {name: streamed.map.build(name, get) for name in streamed.map.origins}
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model


def load(folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A folder as transformers loads it, to compute in float32, and what it says about its tensors."""
    loader = task_of(AutoConfig.from_pretrained(folder)).loader
    model, info = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model.eval(), info


def logits(model: PreTrainedModel, vocabulary: int = 160) -> torch.Tensor:
    """Logits, or whatever else the model gives out, for three fixed rows."""
    ids = torch.randint(0, vocabulary, (3, 32), generator=torch.Generator().manual_seed(11))
    with torch.no_grad():
        return task_of(model.config).output(model(ids)).float()


TIMED = {"report.json", "README.md", MANIFEST}  # these say how long things took
SMALL_METHOD = {"name": "gptq", "bits": 4, "group_size": 32}
SMALL = {
    "calibration": {"samples": 4, "length": 16},
    "run": {"threads": 1, "batch_tokens": 32},
    "stage": {"format": {"name": "dense"}},
}


def close(found: Tensor, right: Tensor, rounding: float = ROUNDING) -> bool:
    """Whether logits are the same but for the rounding of float32."""
    return bool((found - right).abs().max() <= rounding * right.std())


def assert_loads_packed(stage: StageReport, out: Path, original: Path, again: Path, rounding: float = ROUNDING) -> None:
    """A result in a format of llmshrink's own is as planned, loads whole, means what it stores, and is saved again."""
    assert all(check.passed for check in stage.checks if check.name != "reader"), stage.checks
    assert (stage.bytes_after == stage.planned_bytes_after) == (stage.packed is None)
    assert stage.bytes_after <= (stage.planned_bytes_after or 0)
    model, info = load(out)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    treated = [layer for layer in stage.layers if layer.method]
    assert sum(isinstance(module, Packed) for module in model.modules()) == len(treated)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = model.config.tie_word_embeddings and head is not None
    assert isinstance(head, TiedHead) == bool(tied and isinstance(table, Packed))
    right = logits(decoded_model(out, original))
    assert close(logits(model), right, rounding)
    assert not close(logits(load(original)[0]), right, rounding)
    if model.can_generate():
        tokens = model.generate(torch.tensor([[1, 2, 3]]), min_new_tokens=4, max_new_tokens=4, do_sample=False)
        assert tokens.shape == (1, 7)
    model.save_pretrained(again)
    assert close(logits(load(again)[0]), right, rounding)
    model.dequantize()
    assert not any(isinstance(module, Packed | TiedHead) for module in model.modules())
    if tied:
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert close(logits(model), right, rounding)


def assert_reads_rows(fmt: Format, slot: Slot, packed: dict[str, Tensor], config: dict[str, Any] | None) -> None:
    """Rows that are decoded alone are those of the whole matrix."""
    whole = decode(fmt.unpack(slot, packed.__getitem__, config))
    read = fmt.reader(slot, packed.__getitem__, config)
    for rows in (torch.tensor([3, 0, 3, len(whole) - 1]), slice(1, 6), slice(len(whole) - 2, len(whole) + 9)):
        assert torch.allclose(read(rows), whole[rows], atol=1e-5)


def content(folder: Path) -> dict[str, str]:
    """SHA-256 of each file whose bytes may not depend on the clock."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in TIMED | {"recipe.yaml"}]
    return {p.relative_to(folder).as_posix(): sha256(p) for p in files}


def assert_complete(folder: Path, *, killed: bool = False) -> None:
    """The folder holds what its manifest lists and nothing else; a run killed at its very end leaves its work there."""
    listed = json.loads((folder / MANIFEST).read_bytes())["files"]
    assert {p.name for p in folder.iterdir()} - ({WORK} if killed else set()) == {*listed, MANIFEST}
    assert all(sha256(folder / name) == entry["sha256"] for name, entry in listed.items())


def tensors(value: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of a form, with their place in it."""
    if isinstance(value, Tensor):
        yield name, value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors(getattr(value, field.name), f"{name}.{field.name}")


class Stopping(Silent):
    """Ends a run as a signal does, where it tells for the nth time of a step, or of what a note begins with."""

    def __init__(self, times: int = 1, *, step: str = "", note: str = "") -> None:
        self._left, self._wanted, self._note, self._step = times, step, note, ""

    def start(self, step: str, total: int, done: int = 0) -> None:
        self._step = step

    def advance(self, amount: int, note: str = "") -> None:
        self._left -= self._step.startswith(self._wanted) and note.startswith(self._note)
        if not self._left:
            raise InterruptedRun("stopped")


def assert_reads_packed(fmt: OwnFormat, slot: Slot, plain: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Codes that are entropy-coded, of all tensors that hold any, mean the same."""
    found = {name: entropy.pack(plain[name], bits) for name, bits in fmt.code_bits(config).items()}
    shorter = {name: tensor for name, tensor in found.items() if tensor is not None}
    packed, said = {**plain, **shorter}, packed_config(config, {n: len(t) for n, t in shorter.items()})
    assert shorter and fmt.cannot_read(said) is None and said["format_version"] != config["format_version"]
    assert all(torch.equal(fmt.opened(name, packed[name], said), plain[name]) for name in shorter)
    one, other = (fmt.unpack(slot, *place) for place in ((packed.__getitem__, said), (plain.__getitem__, config)))
    assert torch.equal(decode(one), decode(other))
    assert_reads_rows(fmt, slot, packed, said)
