"""The GGUF container: exact sizes, a foreign reader and writer, damaged and hostile files."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf as foreign
import numpy as np
import pytest
import torch

from llmshrink.block_types import BLOCK_TYPES
from llmshrink.errors import InputError
from llmshrink.io import gguf
from llmshrink.io.files import sha256
from llmshrink.io.ggml import TYPES, Entry
from llmshrink.io.gguf import Array, GgufFile

METADATA: dict[str, gguf.Value] = {
    "general.architecture": "llama",
    "number": 2**32 - 1,
    "fraction": 0.5,
    "yes": True,
    "texts": ["a", "", "βγ\n"],
    "numbers": [1, -2],
    "fractions": [0.25, -1e9],
}
ENTRIES = [
    Entry("b", "F32", (3, 5)),
    Entry("a", "Q8_0", (2, 64)),
    Entry("c", "BF16", (7,)),
    Entry("d", "F16", (2, 3, 4)),
    Entry("e", "Q4_K", (3, 512)),
]
TENSORS = {
    "a": torch.arange(136, dtype=torch.uint8).view(2, 68),
    "b": torch.arange(15.0).view(5, 3).T,  # not contiguous
    "c": torch.arange(7, dtype=torch.bfloat16),
    "d": torch.arange(24, dtype=torch.float16).view(2, 3, 4),
    "e": torch.arange(864, dtype=torch.int32).to(torch.uint8).view(3, 288),
}


def written(folder: Path) -> Path:
    path = folder / "model.gguf"
    gguf.write(path, METADATA, ENTRIES, TENSORS.__getitem__)
    return path


def test_types_are_those_of_ggml() -> None:
    theirs = {kind.name: (kind.value, *sizes) for kind, sizes in foreign.GGML_QUANT_SIZES.items()}
    assert theirs.items() <= {name: tuple(kind) for name, kind in TYPES.items()}.items()


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = GgufFile.open(written(tmp_path))
    values = {key: value.values() if isinstance(value, Array) else value for key, value in found.metadata.items()}
    assert values == METADATA
    assert list(found.entries.values()) == ENTRIES
    assert all(torch.equal(found.get(name), tensor) for name, tensor in TENSORS.items())


def test_gguf_py_reads_what_we_write(tmp_path: Path) -> None:
    found = foreign.GGUFReader(written(tmp_path))
    assert {key: found.fields[key].contents() for key in METADATA} == METADATA
    theirs = {tensor.name: tensor for tensor in found.tensors}
    for entry in ENTRIES:
        assert theirs[entry.name].tensor_type.name == entry.type
        assert tuple(theirs[entry.name].shape.tolist()) == entry.shape[::-1]
        ours = TENSORS[entry.name].contiguous().view(-1).view(torch.uint8).numpy()
        assert np.array_equal(theirs[entry.name].data.reshape(-1).view(np.uint8), ours)


def test_we_read_what_gguf_py_writes(tmp_path: Path) -> None:
    writer = foreign.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_uint64("big", 2**40)
    writer.add_int8("small", -3)
    writer.add_float64("double", 0.1)
    writer.add_array("texts", ["x", "y"])
    writer.add_array("numbers", [1.5, 2.5])
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).numpy()
    for kind in (foreign.GGMLQuantizationType.Q8_0, foreign.GGMLQuantizationType.Q4_0):
        writer.add_tensor(kind.name, foreign.quants.quantize(weight, kind), raw_dtype=kind)
    writer.add_tensor("dense", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GgufFile.open(tmp_path / "theirs.gguf")
    assert (found.metadata["big"], found.metadata["small"], found.metadata["double"]) == (2**40, -3, 0.1)
    texts, numbers = found.metadata["texts"], found.metadata["numbers"]
    assert isinstance(texts, Array) and texts.values() == ["x", "y"]
    assert isinstance(numbers, Array) and numbers.values() == [1.5, 2.5]
    assert np.array_equal(found.get("dense").numpy(), weight)
    assert found.entries["Q4_0"].shape == (4, 64) and found.get("Q4_0").shape == (4, 36)
    decoded = foreign.quants.dequantize(found.get("Q8_0").numpy(), foreign.GGMLQuantizationType.Q8_0)
    assert np.abs(decoded - weight).max() < 0.02


def test_the_size_is_known_before_there_is_data(tmp_path: Path) -> None:
    assert written(tmp_path).stat().st_size == gguf.file_size(METADATA, ENTRIES)


def test_the_same_is_written_each_time_and_its_hash_given(tmp_path: Path) -> None:
    first = gguf.write(tmp_path / "1.gguf", METADATA, ENTRIES, TENSORS.__getitem__)
    second = gguf.write(tmp_path / "2.gguf", METADATA, ENTRIES, lambda name: TENSORS[name].clone())
    assert first == second == sha256(tmp_path / "1.gguf") == sha256(tmp_path / "2.gguf")


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        gguf.write(tmp_path / "model.gguf", METADATA, [*ENTRIES, Entry("z", "F32", (1,))], TENSORS.__getitem__)
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_mapped_and_lists_left_in_the_file(tmp_path: Path) -> None:
    size = 1 << 24
    words: list[str] = ["word"] * 100_000
    entry = Entry("a", "F32", (size // 4,))
    gguf.write(tmp_path / "model.gguf", {"words": words}, [entry], lambda _: torch.zeros(size // 4))
    tracemalloc.start()
    found = GgufFile.open(tmp_path / "model.gguf")
    found.get("a")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


# --- damage


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, sizes: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes) + struct.pack("<IQ", kind, offset)


def file(entries: list[bytes], tensors: list[bytes], data: int = 64, counts: tuple[int, int] | None = None) -> bytes:
    """A file with any entries; `counts` in place of their true numbers."""
    numbers = counts or (len(tensors), len(entries))
    raw = b"GGUF" + struct.pack("<IQQ", 3, *numbers) + b"".join(entries) + b"".join(tensors)
    return raw.ljust(-(-len(raw) // 32) * 32, b"\0") + bytes(data)


def value(kind: int, raw: bytes) -> bytes:
    return text(b"key") + struct.pack("<I", kind) + raw


GOOD = [tensor(b"a", (8,)), tensor(b"b", (4, 2), offset=32)]
HUGE = 2**63
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a GGUF file"),
    "another format": (b"\x80\x04" * 50, "not a GGUF file"),
    "only the magic": (b"GGUF", "ends within its header"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "version 2": (b"GGUF" + struct.pack("<IQQ", 2, 0, 0), "has version 2"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "has version 50331648"),
    "more tensors than bytes": (file([], GOOD, counts=(10_000, 0)), "0 dimensions"),
    "too many tensors": (file([], GOOD, counts=(HUGE, 0)), "tensors"),
    "too many entries": (file([], GOOD, counts=(2, HUGE)), "metadata entries"),
    "a key without end": (file([struct.pack("<Q", HUGE)], GOOD), "bytes in a text"),
    "a key that is too long": (file([text(b"k" * 70_000) + struct.pack("<II", 4, 1)], GOOD), "bytes in a text"),
    "a key twice": (file([value(4, bytes(4))] * 2, GOOD), "'key' is there twice"),
    "a text that is no UTF-8": (file([value(8, text(b"\xff\xfe"))], GOOD), "truncated or damaged"),
    "a kind of value that is none": (file([value(77, bytes(8))], GOOD), "unknown kind 77"),
    "a list of a kind that is none": (file([value(9, struct.pack("<IQ", 77, 1))], GOOD), "unknown kind 77"),
    "a list of lists": (file([value(9, struct.pack("<IQIQ", 9, 1, 4, 1) + bytes(4))], GOOD), "unknown kind 9"),
    "a list without end": (file([value(9, struct.pack("<IQ", 12, HUGE))], GOOD), "elements in a list"),
    "a list longer than the file": (file([value(9, struct.pack("<IQ", 8, 10**7))], GOOD), "ends within|bytes in"),
    "an alignment of 0": (file([text(b"general.alignment") + struct.pack("<II", 4, 0)], GOOD), "alignment is 0"),
    "an alignment of 7": (file([text(b"general.alignment") + struct.pack("<II", 4, 7)], GOOD), "alignment is 7"),
    "an alignment that is true": (file([text(b"general.alignment") + struct.pack("<I?", 7, True)], GOOD), "is True"),
    "a tensor twice": (file([], [tensor(b"a", (8,)), tensor(b"a", (8,), offset=32)]), "'a' is there twice"),
    "a name that is too long": (file([], [tensor(b"a" * 64, (16,))]), "bytes in a text"),
    "no dimensions": (file([], [tensor(b"a", ())]), "0 dimensions"),
    "five dimensions": (file([], [tensor(b"a", (1, 1, 1, 1, 1))]), "5 dimensions"),
    "sizes that overflow": (file([], [tensor(b"a", (2**40, 2**40))]), "no F32 tensor has the shape"),
    "an overflow times zero": (file([], [tensor(b"a", (0, 2**52, 2**52))]), "no F32 tensor has the shape"),
    "a size of zero": (file([], [tensor(b"a", (0,))]), "no F32 tensor has the shape"),
    "an unknown type": (file([], [tensor(b"a", (16,), 4)]), "unknown type 4"),
    "half a block": (file([], [tensor(b"a", (48,), 8)]), "no Q8_0 tensor has the shape"),
    "overlapping tensors": (file([], [tensor(b"a", (8,)), tensor(b"b", (8,))]), "does not lie where"),
    "a hole": (file([], [tensor(b"a", (8,)), tensor(b"b", (8,), offset=64)], 128), "does not lie where"),
    "an offset that is not aligned": (file([], [tensor(b"a", (1,)), tensor(b"b", (1,), offset=4)]), "does not lie"),
    "an offset beyond the file": (file([], [tensor(b"a", (8,), offset=HUGE)]), "does not lie where"),
    "a tensor beyond the file": (file([], [tensor(b"a", (2**40,))]), "describes"),
    "the data cut short": (file([], GOOD, 63), "describes"),
    "data of nobody": (file([], GOOD, 65), "describes"),
}


def test_the_builder_of_damage_builds_good_files(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(file([value(8, text(b"x"))], GOOD))
    found = GgufFile.open(tmp_path / "model.gguf")
    assert found.metadata == {"key": "x"} and found.get("b").shape == (2, 4)


@pytest.mark.parametrize(("content", "word"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_refused_with_their_name(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(InputError, match=word) as error:
        GgufFile.open(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(path) in str(error.value)
    assert peak < 1_000_000


@pytest.mark.parametrize(
    "cut", [lambda raw: raw[:-33], lambda raw: raw[: len(raw) // 2], lambda raw: raw[:100], lambda raw: raw + b"x"]
)
def test_a_file_of_another_length_is_refused(tmp_path: Path, cut: Callable[[bytes], bytes]) -> None:
    path = written(tmp_path)
    path.write_bytes(cut(path.read_bytes()))
    with pytest.raises(InputError, match=r"model\.gguf"):
        GgufFile.open(path)


def test_block_types_are_those_of_the_table() -> None:
    assert {name: (kind.size, kind.bytes) for name, kind in BLOCK_TYPES.items()} == {
        name: (TYPES[name].values, TYPES[name].bytes) for name in BLOCK_TYPES
    }
