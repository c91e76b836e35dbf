"""Weights from strangers: headers that lie, an index that leads elsewhere, files that are something else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from llmshrink.io import safetensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Header = dict[str, Any]


def rewritten(folder: Path, edit: Callable[[Header], Any]) -> None:
    """Change the header of the weights, or put another text in its place; the tensors' bytes stay."""
    path = folder / WEIGHTS
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    changed = edit(header)
    raw = changed if isinstance(changed, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])


def entry(**changes: Any) -> Callable[[Header], None]:
    """Change one tensor's entry."""

    def edit(header: Header) -> None:
        header["model.norm.weight"].update(changes)

    return edit


def overlap(header: Header) -> None:
    first, second, *_ = sorted((e for n, e in header.items() if n[0] != "_"), key=lambda e: e["data_offsets"])
    second["data_offsets"] = first["data_offsets"]


def twice(header: Header) -> bytes:
    text = json.dumps(header)
    return (text[:-1] + ', "model.norm.weight": ' + json.dumps(header["model.norm.weight"]) + "}").encode()


def many(header: Header) -> bytes:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return json.dumps({**header, **{f"t{i}": empty for i in range(2000)}}).encode()


HEADERS: dict[str, tuple[Callable[[Header], Any], str]] = {
    "overlapping tensors": (overlap, "does not lie where its shape says"),
    "a hole": (lambda h: h.pop("lm_head.weight") and None, "does not lie where its shape says"),
    "negative sizes": (entry(shape=[-4, -8]), "not a list of whole numbers"),
    "a huge size": (entry(shape=[10**12]), "does not lie where its shape says"),
    "sizes that overflow": (entry(shape=[2**40, 2**40]), "no tensor has the shape"),
    "an overflow times zero": (entry(shape=[0, 2**52, 2**52]), "no tensor has the shape"),
    "a number of 4000 digits": (entry(shape=[10**3999]), "not a list of whole numbers"),
    "a thousand dimensions": (entry(shape=[1] * 1000), "no tensor has the shape"),
    "true for one": (entry(shape=[True, 32]), "not a list of whole numbers"),
    "floats": (entry(shape=[32.0]), "not a list of whole numbers"),
    "infinite": (entry(shape=[float("inf")]), "not a list of whole numbers"),
    "text for a size": (entry(shape="32"), "not a list of whole numbers"),
    "three offsets": (entry(data_offsets=[0, 1, 2]), "does not lie where its shape says"),
    "offsets as text": (entry(data_offsets=["0", "128"]), "not a list of whole numbers"),
    "offsets as floats": (entry(data_offsets=[0.0, 128.0]), "not a list of whole numbers"),
    "an unknown dtype": (entry(dtype="F4096"), "F4096"),
    "a dtype that is none": (entry(dtype=["F32"]), "cannot be parsed"),
    "a tensor twice": (twice, "'model.norm.weight' is there twice"),
    "a tensor that is none": (lambda h: h.update({"x": 5}), "cannot be parsed"),
    "a list": (lambda h: b"[1, 2]", "cannot be parsed"),
    "deep": (lambda h: b"[" * 100_000 + b"]" * 100_000, "nested deeper"),
    "deep within an entry": (entry(more=json.loads("[" * 90 + "]" * 90)), "nested deeper"),
    "a million brackets": (lambda h: b'{"a":' * 200_000, "cannot be parsed"),
    "no JSON": (lambda h: b"\x80\x04\x95", "cannot be parsed"),
    "too many tensors": (many, "2,0"),
}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a thousand tensors were more than any model has."""
    monkeypatch.setattr(safetensors, "MAX_TENSORS", 1000)


@pytest.mark.parametrize(("edit", "words"), HEADERS.values(), ids=HEADERS)
def test_a_header_that_lies(
    few: None, attack: Callable[..., str], model: Path, edit: Callable[[Header], Any], words: str
) -> None:
    rewritten(model, edit)
    said = attack(8, model)
    assert WEIGHTS in said and words in said


CONTENTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a header of 10^12 bytes": (lambda b: (10**12).to_bytes(8, "little") + b[8:], "claims 1000000000000 bytes"),
    "a header of 2^64 bytes": (lambda b: b"\xff" * 8 + b[8:], "claims 18446744073709551615 bytes"),
    "a header of 2^63 bytes": (lambda b: (2**63).to_bytes(8, "little") + b[8:], "claims 9223372036854775808 bytes"),
    "a pointer of LFS": (
        lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        "git lfs pull",
    ),
    "nothing": (lambda b: b"", "truncated or damaged"),
    "seven bytes": (lambda b: b[:7], "truncated or damaged"),
    "one byte fewer": (lambda b: b[:-1], "truncated or damaged"),
    "half": (lambda b: b[: len(b) // 2], "truncated or damaged"),
    "two bytes more": (lambda b: b + b"\0\0", "truncated or damaged"),
    "a pickle": (lambda b: b"\x80\x04\x95\x1f\0\0\0\0\0\0\0\x8c\x05posix", "truncated or damaged"),
    "a web page": (lambda b: b"<!DOCTYPE html><html>Sign in</html>", "truncated or damaged"),
}


@pytest.mark.parametrize(("change", "words"), CONTENTS.values(), ids=CONTENTS)
def test_a_file_that_is_something_else(
    attack: Callable[..., str], model: Path, change: Callable[[bytes], bytes], words: str
) -> None:
    path = model / WEIGHTS
    path.write_bytes(change(path.read_bytes()))
    said = attack(8, model)
    assert WEIGHTS in said and words in said


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", INDEX])
def test_a_pipe_in_place_of_a_file_does_not_hold_the_program(
    attack: Callable[..., str], model: Path, name: str
) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    assert name in attack(5, model)


def test_a_device_in_place_of_a_file_is_not_read(attack: Callable[..., str], model: Path) -> None:
    (model / "config.json").unlink()
    (model / "config.json").symlink_to("/dev/zero")
    assert "config.json" in attack(5, model)


@pytest.mark.parametrize(
    ("name", "code"), [(WEIGHTS, 5), ("config.json", 5), ("tokenizer.json", 5), ("generation_config.json", 5)]
)
def test_a_link_out_of_the_folder(attack: Callable[..., str], model: Path, canary: Path, name: str, code: int) -> None:
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(canary)
    said = attack(code, model)
    assert name in said and "link" in said


@pytest.fixture
def sharded(model: Path) -> Callable[..., Path]:
    """A function that splits the model's weights in two and writes an index with changes."""

    def make(edit: Callable[[dict[str, Any]], Any] = lambda _: None) -> Path:
        tensors = load_file(model / WEIGHTS)
        names = sorted(tensors)
        weight_map = {}
        for shard, part in (("a.safetensors", names[:5]), ("b.safetensors", names[5:])):
            save_file({name: tensors[name] for name in part}, model / shard, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, shard)
        (model / WEIGHTS).rename(model.parent / "whole.safetensors")
        index = {"metadata": {}, "weight_map": weight_map}
        changed = edit(index)
        (model / INDEX).write_bytes(changed if isinstance(changed, bytes) else json.dumps(index).encode())
        return model

    return make


NAMES = [
    *("/etc/hostname", "/etc/x.safetensors", "../whole.safetensors", "..\\whole.safetensors", "C:\\x.safetensors"),
    *(
        "C:x.safetensors",
        "sub/x.safetensors",
        "..",
        ".",
        "",
        "pytorch_model.bin",
        "a.safetensors.pt",
        "~/x.safetensors",
    ),
    *("\\\\host\\share\\x.safetensors", "file:///etc/hostname", "a\0.safetensors", "a.safetensors/", None, 5, True),
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_an_index_that_leads_elsewhere(attack: Callable[..., str], sharded: Callable[..., Path], name: object) -> None:
    def edit(index: dict[str, Any]) -> None:
        index["weight_map"]["model.norm.weight"] = name

    folder = sharded(edit)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    said = attack(5 if isinstance(name, str) else 8, folder)
    assert INDEX in said


def test_a_shard_that_is_a_link_out_of_the_folder(
    attack: Callable[..., str], sharded: Callable[..., Path], canary: Path
) -> None:
    folder = sharded()
    (folder / "a.safetensors").unlink()
    (folder / "a.safetensors").symlink_to(canary)
    assert "a.safetensors is a link" in attack(5, folder)


def test_a_cache_of_the_attacker_does_not_widen_where_links_may_lead(
    attack: Callable[..., str], model: Path, tmp_path: Path, canary: Path
) -> None:
    """The Hub's cache is known by its folders' names, which anybody can give."""
    folder = tmp_path / "models--x" / "snapshots" / "0" / "model"
    folder.parent.mkdir(parents=True)
    model.rename(folder)
    (tmp_path / "models--x" / "blobs").symlink_to(canary.parent)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(tmp_path / "models--x" / "blobs" / "canary")
    assert "is a link" in attack(5, folder)


INDICES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no map": (lambda i: i.pop("weight_map") and None, "no JSON object with a 'weight_map'"),
    "a list for a map": (lambda i: i.update(weight_map=["a.safetensors"]), "no JSON object with a 'weight_map'"),
    "lists for names": (lambda i: i["weight_map"].update(x=["a.safetensors"]), "not a valid index"),
    "a list": (lambda i: b"[]", "not a valid index"),
    "deep": (lambda i: b'{"weight_map":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper"),
    "a tensor twice": (
        lambda i: json.dumps(i).replace('"weight_map": {', '"weight_map": {"model.norm.weight": "a.safetensors",'),
        "'model.norm.weight' is there twice",
    ),
    "a tensor too many": (lambda i: i["weight_map"].update(x="a.safetensors"), "which does not hold it"),
    "in the other shard": (
        lambda i: i["weight_map"].update({"model.norm.weight": "a.safetensors"}),
        "which does not hold it",
    ),
    "a million tensors": (
        lambda i: i["weight_map"].update({f"t{n}": "a.safetensors" for n in range(2000)}),
        "no model has so many",
    ),
    "a missing shard": (lambda i: i["weight_map"].update(x="c.safetensors"), "is not there"),
    "its own name": (lambda i: i["weight_map"].update(x=INDEX), "truncated or damaged"),
}


@pytest.mark.parametrize(("edit", "words"), INDICES.values(), ids=INDICES)
def test_an_index_that_lies(
    few: None,
    attack: Callable[..., str],
    sharded: Callable[..., Path],
    edit: Callable[[dict[str, Any]], Any],
    words: str,
) -> None:
    def changed(index: dict[str, Any]) -> Any:
        found = edit(index)
        return found.encode() if isinstance(found, str) else found

    assert words in attack(8, sharded(changed))


def test_a_tensor_in_two_shards(attack: Callable[..., str], sharded: Callable[..., Path]) -> None:
    folder = sharded()
    first, second = (load_file(folder / f"{name}.safetensors") for name in "ab")
    save_file({**first, "model.norm.weight": second["model.norm.weight"]}, folder / "a.safetensors")
    assert "which one counts" in attack(8, folder)
