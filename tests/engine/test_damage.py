"""A journal or a file that was damaged: what is before the damage is kept, what is lost is said."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_workspace import IDENTITY, unfinished

from llmshrink.engine.workspace import WORK, Workspace

BLOCKS = 3


def begin(output: Path) -> tuple[int, str]:
    """How many blocks a run finds, and what it says of those it lost."""
    with Workspace(output) as workspace:
        found = len(workspace.begin(IDENTITY, resume=True))
        assert found == BLOCKS or len(workspace.events) <= 1
        return found, " ".join(event.message for event in workspace.events if event.kind == "work_lost")


@pytest.fixture
def again(tmp_path: Path) -> Callable[[], Path]:
    """A function that brings an unfinished run of three blocks back, and returns its journal."""
    unfinished(tmp_path / "saved")
    partial = tmp_path / "out.partial"

    def restore() -> Path:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(tmp_path / "saved.partial", partial)
        return partial / WORK / "journal"

    return restore


def lines_before(journal: bytes, position: int) -> int:
    """Whole entries in front of a position; the first line is the identity's."""
    return max(journal[:position].count(b"\n") - 1, 0)


def test_a_bit_flipped_anywhere_in_the_journal(tmp_path: Path, again: Callable[[], Path]) -> None:
    whole = again().read_bytes()
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 1 << position % 8
        again().write_bytes(bytes(data))
        found, said = begin(tmp_path / "out")
        assert found == lines_before(whole, position), position
        assert "journal is damaged" in said, position
        assert ("begins anew" in said) == (position <= whole.index(b"\n")), position


def test_a_journal_cut_anywhere(tmp_path: Path, again: Callable[[], Path]) -> None:
    whole = again().read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole)):
        again().write_bytes(whole[:size])
        found, said = begin(tmp_path / "out")
        complete = size in ends  # but for its line break
        assert found == lines_before(whole, size + complete), size
        torn = size - 1 not in ends and not complete
        assert bool(said) == (torn or size < ends[0]), size
        left = {path.name for path in (tmp_path / "out.partial").iterdir()}
        assert left == {WORK, *(f"shard-{index}" for index in range(found))}, size


def flip(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").touch()


HARMS = [flip, cut, Path.unlink, make_folder]


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("index", range(BLOCKS))
def test_a_damaged_file_takes_its_block_and_those_after_it_along(
    tmp_path: Path, again: Callable[[], Path], harm: Callable[[Path], None], index: int
) -> None:
    again()
    harm(tmp_path / "out.partial" / f"shard-{index}")
    found, said = begin(tmp_path / "out")
    assert found == index
    assert f"shard-{index} is damaged or gone: {BLOCKS - index} finished steps are done again" in said
    assert not (tmp_path / "out.partial" / f"shard-{index}").exists()  # nothing is in the way of the next


@pytest.mark.parametrize("harm", [Path.unlink, make_folder, lambda path: path.write_bytes(b"")])
def test_a_journal_that_is_gone_is_told(
    tmp_path: Path, again: Callable[[], Path], harm: Callable[[Path], None]
) -> None:
    harm(again())
    found, said = begin(tmp_path / "out")
    assert found == 0 and "journal is damaged or gone: the run begins anew" in said
    assert {path.name for path in (tmp_path / "out.partial").rglob("*")} == {WORK, "journal"}


def test_nothing_is_said_where_nothing_is_lost(tmp_path: Path, again: Callable[[], Path]) -> None:
    again()
    assert begin(tmp_path / "out") == (BLOCKS, "")
    with Workspace(tmp_path / "out") as workspace:  # anew, as it was asked for
        assert workspace.begin(IDENTITY, resume=False) == [] and not workspace.events
    assert begin(tmp_path / "out") == (0, "")
    assert begin(tmp_path / "new") == (0, "")


def test_a_removal_that_was_cut_short_locks_nobody_out(
    tmp_path: Path, again: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder keeps its mark to the end: without it the next run would take it for somebody else's."""
    removed: list[Path] = []
    unlink = Path.unlink

    def fails_at(number: int) -> Callable[..., None]:
        def remove(path: Path, missing_ok: bool = False) -> None:
            if "lock" not in path.name:
                removed.append(path)
            if len(removed) == number:
                raise OSError("no such luck")
            unlink(path, missing_ok)

        return remove

    for number in (1, 2, 3):
        again()
        removed.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", fails_at(number))
            with pytest.raises(OSError, match="no such luck"), Workspace(tmp_path / "out") as workspace:
                workspace.begin(IDENTITY, resume=False)
        assert begin(tmp_path / "out")[0] <= BLOCKS
