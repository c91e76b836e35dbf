"""What reads bytes that somebody else wrote, each as a function of these bytes.

Any bytes give a valid result or one of llmshrink's own errors: no other exception, no endless loop, no heap of memory.
`test_fuzz.py` holds that with Hypothesis; `run.py` looks further, led by coverage.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from tiny import build_model, config

from llmshrink.calibration.rows import Rows
from llmshrink.calibration.text import documents
from llmshrink.checks.finished import verify_folder
from llmshrink.engine.workspace import MANIFEST, Workspace, write_manifest
from llmshrink.errors import LlmshrinkError
from llmshrink.formats import load_format
from llmshrink.formats.base import Slot
from llmshrink.formats.bnb import STATE
from llmshrink.gguf.checkpoint import SINGLE, GgufCheckpoint
from llmshrink.io import safetensors
from llmshrink.methods import load_method
from llmshrink.methods.base import Prepared
from llmshrink.model.source import Source, open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.model.weights import Weights
from llmshrink.progress import Silent
from llmshrink.recipe import load, text
from llmshrink.report.schema import EventRecord, LayerReport, ModelInfo, Report, StageReport

CPU = torch.device("cpu")
KEY = "model.layers.0.mlp.up_proj.weight"


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


@dataclass(frozen=True)
class Target:
    """One reader with valid inputs, and how such an input is seen as JSON, to be changed there."""

    read: Callable[[bytes], object]
    seeds: list[bytes]
    plain: Callable[[bytes], Any] = json.loads
    written: Callable[[Any], bytes] = as_json

    def run(self, data: bytes) -> bool:
        """Read; whether the bytes were accepted."""
        try:
            self.read(data)
        except LlmshrinkError:
            return False
        return True


# --- recipes


def recipe(folder: Path) -> Target:
    path = folder / "recipe.yaml"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = load.dump(load.load(str(path)))
        assert load.dump(load.validate(text.parse(found, "dump"))) == found

    def plain(data: bytes) -> Any:
        return text.parse(data.decode(), "seed")

    return Target(read, [p.read_bytes() for p in load.built_in().values()], plain)


def overrides(folder: Path) -> Target:
    base = {"version": 1, "stages": [{"task": "quantize"}, {"task": "eval"}]}

    def read(data: bytes) -> None:
        load.validate(load.apply_overrides(base, data.decode(errors="replace").split("\n")))

    def written(value: Any) -> bytes:
        pairs = value.items() if isinstance(value, dict) else [("stages", value)]
        return "\n".join(f"{path}={json.dumps(setting)}" for path, setting in pairs).encode()

    values = {"method.bits": 3, "stages[0].layers": {".*": None}, "calibration.data": "a.txt", "run": {"threads": 2}}
    return Target(read, [written(values)], lambda _: values, written)


# --- weights


def tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.zeros(4, 4), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.zeros(0, dtype=torch.bool)}


def container(folder: Path) -> Target:
    path = folder / safetensors.SINGLE
    safetensors.write(path, tensors())
    seed = path.read_bytes()
    length = int.from_bytes(seed[:8], "little")

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = safetensors.Checkpoint.open(folder)
        for name in found.infos:
            found.get(name)

    def written(value: Any) -> bytes:
        header = as_json(value)
        return len(header).to_bytes(8, "little") + header + seed[8 + length :]

    return Target(read, [seed], lambda data: json.loads(data[8 : 8 + length]), written)


def index(folder: Path) -> Target:
    for name, tensor in tensors().items():
        safetensors.write(folder / f"{name}.safetensors", {name: tensor})
    seed = {"metadata": {"total_size": 70}, "weight_map": {name: f"{name}.safetensors" for name in tensors()}}

    def read(data: bytes) -> None:
        (folder / safetensors.INDEX).write_bytes(data)
        safetensors.Checkpoint.open(folder)

    return Target(read, [as_json(seed)])


def _count(value: Any) -> bytes:
    return struct.pack("<Q", (value if isinstance(value, int) else 7) % 2**64)


def _text(value: Any) -> bytes:
    raw = str(value).encode(errors="surrogatepass")
    return _count(len(raw)) + raw


def _entry(key: str, value: Any) -> bytes:
    """A metadata entry: texts, numbers, and lists of them as lists of texts."""
    if isinstance(value, list):
        return _text(key) + struct.pack("<II", 9, 8) + _count(len(value)) + b"".join(map(_text, value))
    raw = struct.pack("<I", 8) + _text(value) if isinstance(value, str) else struct.pack("<I", 10) + _count(value)
    return _text(key) + raw


def _tensor(name: str, value: Any) -> bytes:
    found = {"sizes": [], "type": 0, "offset": 0, **(value if isinstance(value, dict) else {})}
    sizes = found["sizes"] if isinstance(found["sizes"], list) else [found["sizes"]]
    kinds = [_count(found[part]) for part in ("type", "offset")]
    return _text(name) + _count(len(sizes))[:4] + b"".join(map(_count, sizes)) + kinds[0][:4] + kinds[1]


def gguf_file(folder: Path) -> Target:
    """A GGUF file: as JSON, what its header says."""

    def read(data: bytes) -> None:
        (folder / SINGLE).write_bytes(data)
        found = GgufCheckpoint.open(folder)
        for name, info in found.infos.items():
            assert tuple(found.get(name).shape) == info.shape

    def written(value: Any) -> bytes:
        said = {"metadata": {}, "tensors": {}, **(value if isinstance(value, dict) else {})}
        entries, tensors = (part if isinstance(part, dict) else {} for part in (said["metadata"], said["tensors"]))
        raw = b"GGUF" + struct.pack("<I", 3) + _count(len(tensors)) + _count(len(entries))
        raw += b"".join(_entry(*item) for item in entries.items()) + b"".join(
            _tensor(*item) for item in tensors.items()
        )
        return raw.ljust(-(-len(raw) // 32) * 32, b"\0") + bytes(544)

    heads = {"llama.attention.head_count": 2, "llama.attention.head_count_kv": 1}
    tensors = {
        "blk.0.attn_q.weight": {"sizes": [32, 4], "type": 8, "offset": 0},
        "blk.0.attn_k.weight": {"sizes": [4, 2], "type": 1, "offset": 160},
        "output_norm.weight": {"sizes": [72], "type": 0, "offset": 192},
        "rope_freqs.weight": {"sizes": [16], "type": 0, "offset": 480},
    }
    metadata = {"general.architecture": "llama", "general.alignment": 32, **heads, "llmshrink.cast": ["a", "b"]}
    seed = {"metadata": metadata, "tensors": tensors}
    return Target(read, [written(seed)], lambda _: seed, written)


def stored(fmt: str, method: str, settings: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A compressed matrix and the settings that belong to it."""
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    cls, written = load_method(method), load_format(fmt)
    layer = cls(cls.Config(**settings), written.scale_dtype(torch.float32)).compress(weight, Prepared())
    slot = Slot(KEY, KEY.removesuffix(".weight"), (32, 64), torch.float32)
    found = written.config([(slot, layer)], ["lm_head"], torch.float32)
    assert found is not None
    return written.pack(slot, layer), found


FORMATS = {
    "gptq": ("rtn", {"bits": 3, "group_size": 32, "symmetric": False}),
    "awq": ("rtn", {"bits": 4, "group_size": 32}),
    "compressed-tensors": ("rtn", {"bits": 4, "group_size": 32, "symmetric": False}),
    "bnb": ("nf4", {"double_quant": True}),
}


def look_at(weights: Weights) -> None:
    for key in weights.compressed:
        weights.form(key)
        weights.dense(key)
        weights.stored_bytes(key)
        weights.as_read(key, "linear")


def settings(folder: Path) -> Target:
    """A `quantization_config` beside tensors of each format."""
    checkpoints, seeds = [], []
    for name, (method, wanted) in FORMATS.items():
        (folder / name).mkdir()
        found, said = stored(name, method, wanted)
        safetensors.write(folder / name / safetensors.SINGLE, found)
        checkpoints.append(safetensors.Checkpoint.open(folder / name))
        seeds.append(as_json(said))

    def read(data: bytes) -> None:
        (folder / "config.json").write_bytes(b'{"quantization_config": ' + data + b"}")
        said = Source("x", folder, None).quantization
        for checkpoint in checkpoints:
            with suppress(LlmshrinkError):  # they are of another format
                look_at(Weights(checkpoint, said, torch.float32))

    return Target(read, seeds)


def quant_state(folder: Path) -> Target:
    """What bitsandbytes stores about a matrix, as JSON in a tensor."""
    found, said = stored("bnb", *FORMATS["bnb"])
    name = f"{KEY}.{STATE}nf4"

    def read(data: bytes) -> None:
        changed = {**found, name: torch.tensor(list(data), dtype=torch.uint8)}
        safetensors.write(folder / safetensors.SINGLE, changed)
        look_at(Weights(safetensors.Checkpoint.open(folder), said))

    return Target(read, [bytes(found[name].tolist())])


def configuration(folder: Path) -> Target:
    """config.json of a model."""
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16}
    build_model(folder, config("llama", num_hidden_layers=1, **shape))
    path = folder / "config.json"
    seed = path.read_bytes()

    def read(data: bytes) -> None:
        path.write_bytes(data)
        StreamedModel(open_source(str(folder)), CPU)

    return Target(read, [seed])


# --- what llmshrink itself wrote


def manifest(folder: Path) -> Target:
    (folder / "file").write_text("x")
    write_manifest(folder)
    path = folder / MANIFEST

    def read(data: bytes) -> None:
        path.write_bytes(data)
        verify_folder(folder, progress=Silent())

    return Target(read, [path.read_bytes()])


def seal(lines: Any) -> bytes:
    """Lines with the hashes that say that they are whole."""
    found = [as_json(line) for line in (lines if isinstance(lines, list) else [lines])]
    return b"".join(hashlib.sha256(line).hexdigest().encode() + b" " + line + b"\n" for line in found)


def unseal(data: bytes) -> list[Any]:
    return [json.loads(line.partition(b" ")[2]) for line in data.splitlines()]


def journal(folder: Path) -> Target:
    identity = {"recipe": {"bits": 4}, "threads": 2}
    workspace = Workspace(folder / "out")
    workspace.work.mkdir(parents=True)

    def read(data: bytes) -> None:
        workspace.work.mkdir(parents=True, exist_ok=True)
        workspace._journal.write_bytes(data)
        workspace.begin(identity, resume=True)

    lines = [{"identity": identity}, {"block": 0, "files": {".work/journal": "0" * 64}, "layers": [], "events": []}]
    return Target(read, [seal(lines)], unseal, seal)


def rows(folder: Path) -> Target:
    path, key = folder / "calibration.json", {"length": 3}
    Rows((torch.arange(3), torch.arange(3)), "auto", "in words", "train").save(path, key, [])
    seed = path.read_bytes()

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = Rows.load(path, key)
        assert found is None or found[0].count >= 0

    return Target(read, [seed], lambda data: unseal(data)[0], lambda value: seal(value).rstrip(b"\n"))


def report(folder: Path) -> Target:
    layer = LayerReport(
        name="a", shape=(2, 2), method="rtn", form="Quantized", format="dense", parameters=4, bytes_before=8,
        bytes_after=4, bits_per_weight=8.0, relative_error=0.1,
    )  # fmt: skip
    stage = StageReport(
        task="quantize", format="dense", bytes_before=8, bytes_after=4, bits_per_weight=8.0, layers=[layer]
    )
    seed = Report(
        llmshrink_version="0", recipe={"version": 1}, recipe_hash="0", model=ModelInfo(id="m", source="folder"),
        device="cpu", seed=0, threads=1, stages=[stage], events=[EventRecord(kind="k", message="m")], seconds=1.0,
    )  # fmt: skip

    def read(data: bytes) -> None:
        with suppress(ValidationError):
            found = Report.model_validate_json(data)
            assert Report.model_validate_json(found.model_dump_json()) == found

    return Target(read, [seed.model_dump_json().encode()])


# --- text


def calibration_text(folder: Path) -> Target:
    def read(data: bytes) -> None:
        for suffix in (".txt", ".json", ".jsonl"):
            path = folder / f"text{suffix}"
            path.write_bytes(data)
            with suppress(LlmshrinkError):
                assert all(isinstance(d, str) for d in islice(documents(str(path), seed=1, split="train"), 1000))

    objects = ["one", {"text": "two"}]
    return Target(read, [as_json(objects), b'{"text": "one"}\n"two"', b"one\n\ntwo"], lambda _: objects)


TARGETS: dict[str, Callable[[Path], Target]] = {
    f.__name__: f
    for f in (
        recipe, overrides, container, index, gguf_file, settings, quant_state, configuration, manifest, journal, rows,
        report, calibration_text,
    )
}  # fmt: skip
