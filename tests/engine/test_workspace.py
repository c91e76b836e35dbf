"""The folder of a run: journal, lock, manifest, commit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmshrink.engine.workspace import MANIFEST, WORK, Workspace
from llmshrink.errors import OutputError
from llmshrink.io.files import disk_faults, sha256, write_bytes

IDENTITY = {"recipe": {"bits": 4, "layers": [1, 2]}, "threads": 1}


def block(workspace: Workspace, index: int) -> dict[str, Any]:
    """Write the files of a block and its journal entry, as the engine does."""
    shard = f"shard-{index}"
    entry = {"block": index, "files": {shard: write_bytes(workspace.folder / shard, shard.encode())}}
    workspace.append(entry)
    return entry


def unfinished(output: Path, blocks: int = 3) -> list[dict[str, Any]]:
    with Workspace(output) as workspace:
        assert workspace.begin(IDENTITY, resume=True) == []
        return [block(workspace, index) for index in range(blocks)]


def held(output: Path, identity: dict[str, Any] = IDENTITY, *, resume: bool = True) -> list[dict[str, Any]]:
    with Workspace(output) as workspace:
        return workspace.begin(identity, resume=resume)


def test_entries_come_back(tmp_path: Path) -> None:
    written = unfinished(tmp_path / "out")
    assert held(tmp_path / "out") == written
    assert held(tmp_path / "out") == written  # and again
    assert {p.name for p in tmp_path.iterdir()} == {"out.partial"}


@pytest.mark.parametrize(("name", "kept"), [("shard-0", 0), ("shard-1", 1), ("shard-2", 2), ("other", 3)])
def test_only_what_is_whole_is_held(tmp_path: Path, name: str, kept: int) -> None:
    written = unfinished(tmp_path / "out")
    (tmp_path / "out.partial" / name).write_bytes(b"damaged")
    assert held(tmp_path / "out") == written[:kept]


@pytest.mark.parametrize("tail", [b"", b"7", b'{"block": 9}', b"abc {}", b"\xff\xfe \xff"])
def test_a_torn_line_ends_the_journal(tmp_path: Path, tail: bytes) -> None:
    written = unfinished(tmp_path / "out")
    path = tmp_path / "out.partial" / WORK / "journal"
    path.write_bytes(path.read_bytes() + tail)
    assert held(tmp_path / "out") == written


def test_a_number_changed_within_a_line_is_seen(tmp_path: Path) -> None:
    written = unfinished(tmp_path / "out")
    path = tmp_path / "out.partial" / WORK / "journal"
    path.write_bytes(path.read_bytes().replace(b'"block": 2', b'"block": 3'))
    assert held(tmp_path / "out") == written[:2]


def test_another_identity_is_told_apart_key_by_key(tmp_path: Path) -> None:
    unfinished(tmp_path / "out")
    other = {"recipe": {"bits": 3, "layers": [1, 5], "new": True}, "threads": 1}
    with pytest.raises(OutputError) as caught:
        held(tmp_path / "out", other)
    lines = str(caught.value).splitlines()[1:-1]
    assert lines == ["  - recipe.bits: 4 -> 3", "  - recipe.layers.1: 2 -> 5", "  - recipe.new: None -> True"]
    assert len(held(tmp_path / "out")) == 3  # nothing was lost by asking


def test_no_resume_empties_the_folder(tmp_path: Path) -> None:
    unfinished(tmp_path / "out")
    assert held(tmp_path / "out", {"other": 1}, resume=False) == []
    assert {p.name for p in (tmp_path / "out.partial").rglob("*")} == {WORK, "journal"}


def test_temporary_files_of_a_dead_run_are_removed(tmp_path: Path) -> None:
    unfinished(tmp_path / "out")
    for name in (".shard-3.77.tmp", f"{WORK}/.hidden.77.tmp"):
        (tmp_path / "out.partial" / name).touch()
    held(tmp_path / "out")
    assert not list((tmp_path / "out.partial").rglob("*.tmp"))


def test_commit_leaves_a_folder_that_its_manifest_lists(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with Workspace(out) as workspace:
        workspace.begin(IDENTITY, resume=True)
        block(workspace, 0)
        workspace.commit()
    assert {p.name for p in out.parent.iterdir()} == {"out"}
    assert {p.name for p in out.iterdir()} == {"shard-0", MANIFEST}
    entry = json.loads((out / MANIFEST).read_text())["files"]
    assert entry == {"shard-0": {"bytes": 7, "sha256": sha256(out / "shard-0")}}


def test_an_output_that_appears_during_the_run_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists already"), Workspace(tmp_path / "out") as workspace:
        workspace.begin(IDENTITY, resume=True)
        (tmp_path / "out").mkdir()
        workspace.commit()
    assert {p.name for p in tmp_path.iterdir()} == {"out", "out.partial"}


def test_overwrite_replaces(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    (tmp_path / "out" / MANIFEST).touch()
    with Workspace(tmp_path / "out", overwrite=True) as workspace:
        workspace.begin(IDENTITY, resume=True)
        block(workspace, 0)
        assert (tmp_path / "out" / "old").exists()
        workspace.commit()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"shard-0", MANIFEST}
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize("name", ["out", "out.partial"])
def test_a_folder_of_somebody_else_is_never_touched(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").touch()
    with pytest.raises(OutputError, match="not made by llmshrink"), Workspace(tmp_path / "out", overwrite=True):
        pass
    assert (tmp_path / name / "thesis.tex").exists()


@pytest.mark.parametrize("folder", [".", "..", "~", "/"])
def test_some_folders_are_no_outputs(folder: str) -> None:
    with pytest.raises(OutputError, match="cannot be"), Workspace(Path(folder).expanduser(), overwrite=True):
        pass


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with Workspace(tmp_path / "out"):
        (tmp_path / ".out.lock.json").write_text("torn")
        with pytest.raises(OutputError, match=r"another run\."), Workspace(tmp_path / "out"):
            pass
        assert {p.name for p in tmp_path.iterdir()} == {".out.lock", ".out.lock.json"}
    with Workspace(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    with pytest.raises(OutputError, match=r"file: File exists\.\n"), disk_faults(out, 0), Workspace(out):
        pass
