"""Folders with GGUF files of strangers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import write
from safetensors.torch import load_file
from tiny import build_model, config

from llmshrink.errors import InputError, UnsafeError
from llmshrink.gguf.checkpoint import SINGLE, GgufCheckpoint
from llmshrink.io import gguf
from llmshrink.io.ggml import Entry

HEADS = {"llama.attention.head_count": 4, "llama.attention.head_count_kv": 2}
GOOD: dict[str, Any] = {"general.architecture": "llama", **HEADS}


def folder_with(folder: Path, metadata: dict[str, Any], *entries: Entry) -> Path:
    gguf.write(folder / SINGLE, metadata, entries, lambda name: next(zeros(e) for e in entries if e.name == name))
    return folder


def zeros(entry: Entry) -> torch.Tensor:
    return torch.zeros(entry.stored, dtype=entry.dtype)


def test_it_has_the_interface_of_a_checkpoint(tmp_path: Path) -> None:
    build_model(tmp_path / "source", config("llama"), torch.bfloat16)
    found = GgufCheckpoint.open(write(tmp_path / "source", tmp_path / "out").parent)
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    assert found.folder == tmp_path / "out" and found.files == [SINGLE]
    assert found.file_bytes == (tmp_path / "out" / SINGLE).stat().st_size
    assert found.bytes == sum(t.nbytes * (2 if t.ndim == 1 else 1) for t in tensors.values())
    assert all(torch.equal(found.get(key), tensor.to(found.infos[key].dtype)) for key, tensor in tensors.items())
    assert {info.file for info in found.infos.values()} == {SINGLE}


def test_files_of_other_tools_are_read_too(tmp_path: Path) -> None:
    entries = Entry("blk.0.attn_q.weight", "Q4_K", (16, 256)), Entry("rope_freqs.weight", "F32", (8,))
    found = GgufCheckpoint.open(folder_with(tmp_path, GOOD, *entries))
    assert list(found.infos) == ["model.layers.0.self_attn.q_proj.weight.Q4_K"]
    (info,) = found.infos.values()
    assert (info.dtype, info.shape) == (torch.uint8, (16, 144))


@pytest.mark.parametrize(
    ("metadata", "entry", "word"),
    [
        ({**GOOD, "general.architecture": "mamba"}, None, "architecture 'mamba'"),
        ({**GOOD, "general.architecture": 5}, None, "architecture '5'"),
        (HEADS, None, "architecture 'None'"),
        ({"general.architecture": "llama"}, None, "how many heads"),
        ({**GOOD, "llama.attention.head_count": 0}, None, "how many heads"),
        ({**GOOD, "llama.attention.head_count": "4"}, None, "how many heads"),
        ({**GOOD, "llama.attention.head_count_kv": [2, 2]}, None, "how many heads"),
        (GOOD, Entry("blk.0.attn_q.weight", "F32", (12, 4)), r"no blk.0.attn_q.weight has the shape \[12, 4\]"),
        (GOOD, Entry("blk.0.ffn_up.weight", "F32", (2, 4, 4)), "has the shape"),
    ],
)
def test_what_cannot_be_a_model_is_refused(tmp_path: Path, metadata: Any, entry: Entry | None, word: str) -> None:
    with pytest.raises(InputError, match=word):
        GgufCheckpoint.open(folder_with(tmp_path, metadata, *([entry] if entry else [])))


def test_conv1d_must_be_a_matrix(tmp_path: Path) -> None:
    metadata = {"general.architecture": "gpt2"} | {key.replace("llama", "gpt2"): value for key, value in HEADS.items()}
    with pytest.raises(InputError, match="attn_qkv.weight has the shape"):
        GgufCheckpoint.open(folder_with(tmp_path, metadata, Entry("blk.0.attn_qkv.weight", "F32", (4,))))


@pytest.mark.parametrize(
    "name", ["", "weight", "blk.0", "blk.x.attn_q.weight", "blk.0.attn_q", "../x.weight", "blk.0.attn_q.scale", "\n"]
)
def test_odd_names_of_tensors_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="knows no tensor"):
        GgufCheckpoint.open(folder_with(tmp_path, GOOD, Entry(name, "F32", (8,))))


def test_types_that_cannot_be_decoded_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="IQ4_XS, which is not read"):
        GgufCheckpoint.open(folder_with(tmp_path, GOOD, Entry("blk.0.attn_q.weight", "IQ4_XS", (16, 256))))


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / SINGLE).symlink_to(folder_with(tmp_path / "outside", GOOD) / SINGLE)
    with pytest.raises(UnsafeError, match="link"):
        GgufCheckpoint.open(tmp_path / "model")
