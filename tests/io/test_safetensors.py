"""The container: exact sizes, foreign reader, damaged and hostile files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmshrink.errors import InputError, UnsafeError
from llmshrink.io import safetensors as st
from llmshrink.io.files import sha256

TENSORS = {
    "b.weight": torch.arange(15, dtype=torch.bfloat16).view(3, 5),
    "a": torch.arange(7, dtype=torch.uint8),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "packed": torch.tensor([[-1, 2**31 - 1]], dtype=torch.int32),
    "column": torch.arange(6.0).view(2, 3).T,  # not contiguous
}


def test_safetensors_itself_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    digest = st.write(path, TENSORS)
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
    assert digest == sha256(path)


def test_the_size_is_known_before_there_is_data(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    st.write(path, TENSORS)
    assert path.stat().st_size == st.file_size({n: t.to("meta") for n, t in TENSORS.items()})


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_the_mode_is_what_the_umask_asks_for(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        st.write(tmp_path / "model.safetensors", {"a": torch.zeros(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        st.write(tmp_path / "model.safetensors", {"a": torch.zeros(2, dtype=torch.complex64)})
    assert list(tmp_path.iterdir()) == []


def test_a_write_replaces_a_link_and_does_not_follow_it(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_text("untouched")
    (tmp_path / "model.safetensors").symlink_to(canary)
    st.write(tmp_path / "model.safetensors", {"a": torch.zeros(2)})
    assert canary.read_text() == "untouched"


def good(folder: Path) -> Path:
    save_file({"a": torch.zeros(4, 4), "b": torch.ones(3)}, folder / st.SINGLE)
    return folder / st.SINGLE


def header_of(path: Path, header: object) -> None:
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(76))


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.write_bytes(p.read_bytes()[:-1]),
        lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
        lambda p: p.write_bytes(p.read_bytes() + b"xx"),
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes((10**12).to_bytes(8, "little") + b"{}"),
        lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
        lambda p: header_of(p, {"a": {"dtype": "F32", "shape": [19], "data_offsets": [0, 40]}}),
        lambda p: header_of(p, {"a": {"dtype": "F99", "shape": [19], "data_offsets": [0, 76]}}),
        lambda p: header_of(p, {"a": {"shape": [19], "data_offsets": [0, 76]}}),
        lambda p: header_of(p, [1, 2]),
        lambda p: header_of(
            p,
            {
                "a": {"dtype": "F32", "shape": [10], "data_offsets": [0, 40]},
                "b": {"dtype": "F32", "shape": [10], "data_offsets": [36, 76]},
            },
        ),
    ],
)
def test_damaged_files_are_refused_with_their_name(tmp_path: Path, damage: object) -> None:
    damage(good(tmp_path))  # type: ignore[operator]
    with pytest.raises(InputError, match=r"model\.safetensors"):
        st.Checkpoint.open(tmp_path)


def index(folder: Path, weight_map: object) -> None:
    (folder / st.INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../x.safetensors", "..\\x.safetensors", "C:\\x.safetensors", "model.bin", ""]
)
def test_an_index_cannot_name_a_file_outside(tmp_path: Path, name: str) -> None:
    index(tmp_path, {"a": name})
    with pytest.raises(UnsafeError):
        st.Checkpoint.open(tmp_path)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    target = good(tmp_path / "outside")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / st.SINGLE).symlink_to(target)
    with pytest.raises(UnsafeError, match="link"):
        st.Checkpoint.open(folder)


def test_a_link_of_the_hub_cache_is_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blob = good(tmp_path / "blobs").rename(tmp_path / "blobs" / "0123")
    (snapshot / st.SINGLE).symlink_to(blob)
    assert set(st.Checkpoint.open(snapshot).infos) == {"a", "b"}


@pytest.mark.parametrize(
    ("weight_map", "word"),
    [
        ({"a": "one.safetensors"}, "not there"),
        ({"c": "model.safetensors"}, "does not hold"),
        ([1], "not a valid index"),
    ],
)
def test_an_index_must_agree_with_its_shards(tmp_path: Path, weight_map: object, word: str) -> None:
    good(tmp_path)
    index(tmp_path, weight_map)
    with pytest.raises(InputError, match=word):
        st.Checkpoint.open(tmp_path)


def test_one_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    good(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "two.safetensors")
    index(tmp_path, {"a": "model.safetensors", "b": "two.safetensors"})
    with pytest.raises(InputError, match="which one counts"):
        st.Checkpoint.open(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UnsafeError, match="pickled"):
        st.Checkpoint.open(tmp_path)


def test_a_single_file_beside_an_index_is_refused(tmp_path: Path) -> None:
    good(tmp_path).rename(tmp_path / "one.safetensors")
    index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    assert set(st.Checkpoint.open(tmp_path).infos) == {"a", "b"}
    good(tmp_path)
    with pytest.raises(InputError, match="which one counts"):
        st.Checkpoint.open(tmp_path)
