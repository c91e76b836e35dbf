"""Links planted where a run writes: nothing is written, emptied or deleted through them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llmshrink.engine.workspace import MANIFEST, WORK
from llmshrink.job import Job

Refused = Callable[..., tuple[int, str, set[str]]]
RTN = ("--method", "rtn")
INSIDE = [
    *("config.json", "report.json", "recipe.yaml", "README.md", "model.safetensors.index.json", MANIFEST),
    *("model-00001-of-00003.safetensors", "tokenizer.json", f"{WORK}/journal", f"{WORK}/calibration.json"),
    *(".config.json.1.tmp", f"{WORK}/.journal.1.tmp"),
]


@pytest.mark.parametrize("name", INSIDE)
def test_a_link_in_an_unfinished_output(
    refused: Refused, without_reader: None, model: Path, tmp_path: Path, canary: Path, name: str
) -> None:
    link = tmp_path / "out.partial" / name
    (tmp_path / "out.partial" / WORK).mkdir(parents=True)
    link.symlink_to(canary)
    found, said, left = refused(model, *RTN)
    assert (found, left) == (5, set()) and f"{link} is a link" in said
    assert link.is_symlink() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["out.partial", f"out.partial/{WORK}", f"out/{WORK}", ".out.replaced", "out.partial/1_Pooling"]
)
@pytest.mark.parametrize("marked", [False, True])
def test_a_link_to_a_foreign_folder(
    refused: Refused, without_reader: None, model: Path, tmp_path: Path, canary: Path, name: str, marked: bool
) -> None:
    """Also where the foreign folder looks as if a run had made it."""
    link, foreign = tmp_path / name, canary.parent
    if marked:
        foreign = tmp_path / "elsewhere"
        (foreign / WORK).mkdir(parents=True)
        (foreign / WORK / "precious").write_text("precious")
        (foreign / MANIFEST).write_text("{}")
    (tmp_path / "out.partial" / WORK).mkdir(parents=True) if name.startswith("out.partial/") else None
    if name.startswith("out.partial/") and link.is_dir():
        link.rmdir()
    link.parent.mkdir(exist_ok=True)
    if name.startswith("out/"):
        (link.parent / MANIFEST).write_text("{}")
    link.symlink_to(foreign)
    found, said, left = refused(model, *RTN, "--overwrite")
    assert (found, left) == (5, set()) and f"{link} is a link" in said
    assert link.is_symlink() and (not marked or (foreign / WORK / "precious").read_text() == "precious")


@pytest.mark.parametrize("name", [".out.lock", ".out.lock.json"])
def test_a_link_in_place_of_a_lock(
    refused: Refused, without_reader: None, model: Path, tmp_path: Path, canary: Path, name: str
) -> None:
    (tmp_path / name).symlink_to(canary)
    found, said, left = refused(model, *RTN)
    assert (found, left) == (5, set()) and f"{tmp_path / name} is a link" in said


@pytest.mark.parametrize("name", [".out.lock", ".out.lock.json"])
def test_a_link_to_nothing_in_place_of_a_lock_makes_no_file_there(
    refused: Refused, without_reader: None, model: Path, tmp_path: Path, canary: Path, name: str
) -> None:
    (tmp_path / name).symlink_to(canary.parent / "new")
    assert refused(model, *RTN)[0] == 5


def test_an_output_that_is_a_link_to_a_foreign_folder(
    refused: Refused, without_reader: None, model: Path, tmp_path: Path, canary: Path
) -> None:
    (tmp_path / "out").symlink_to(canary.parent)
    for arguments in ([], ["--overwrite"]):
        found, said, left = refused(model, *RTN, *arguments)
        assert (found, left) == (7, set()) and str(canary.parent) in said


def test_links_in_an_output_that_is_replaced_are_removed_themselves(
    refused: Refused, without_reader: None, model: Path, tmp_path: Path, canary: Path
) -> None:
    assert refused(model, *RTN)[0] == 0
    for name in ("config.json", "link"):
        (tmp_path / "out" / name).unlink(missing_ok=True)
        (tmp_path / "out" / name).symlink_to(canary)
    (tmp_path / "out" / "folder").symlink_to(canary.parent)
    found, said, left = refused(model, *RTN, "--overwrite")
    assert (found, left) == (0, set()), said
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]


def test_a_link_planted_while_a_run_works_is_replaced(
    refused: Refused, without_reader: None, model: Path, tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are made under names of their own and renamed: the rename takes the link's place."""

    compress = Job._compress

    def plant(self: Job, *arguments: object) -> object:
        for name in ("report.json", "recipe.yaml", "README.md", MANIFEST, "model-00002-of-00003.safetensors"):
            (tmp_path / "out.partial" / name).unlink(missing_ok=True)
            (tmp_path / "out.partial" / name).symlink_to(canary)
        return compress(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Job, "_compress", plant)
    assert refused(model, *RTN)[0] == 0
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_symlink()]


def test_a_model_beside_which_links_lie_is_only_read(
    refused: Refused, without_reader: None, model: Path, canary: Path
) -> None:
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    (model / "notes.txt").symlink_to(canary)
    assert refused(model, *RTN)[0] == 0
    assert before == {path.name: path.read_bytes() for path in model.iterdir() if path.name != "notes.txt"}


@pytest.mark.parametrize("name", ["../foreign", "/etc/hostname", "a/../../x"])
def test_a_manifest_that_leads_elsewhere(
    refused: Refused, without_reader: None, model: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmshrink.cli import main

    assert refused(model, *RTN)[0] == 0
    manifest = tmp_path / "out" / MANIFEST
    data = json.loads(manifest.read_text())
    data["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    manifest.write_text(json.dumps(data))
    assert main(["verify", str(tmp_path / "out")]) == 8
    manifest.write_text("[" * 100_000)
    assert main(["verify", str(tmp_path / "out")]) == 9  # a check that failed: it was a folder of ours
    shutil.rmtree(tmp_path / "out")
    assert "internal error" not in capsys.readouterr().err
