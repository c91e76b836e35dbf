"""A run that was stopped goes on, or says why it does not; an output that is there already is safe."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import SMALL, SMALL_METHOD, assert_complete, content, recipe

from llmshrink import job, run
from llmshrink.calibration.load import TextLoader
from llmshrink.engine import compress, workspace
from llmshrink.engine.workspace import WORK
from llmshrink.errors import InterruptedRun, OutputError
from llmshrink.model.anatomy import Block
from llmshrink.progress import Silent
from llmshrink.recipe.schema import Recipe

pytestmark = pytest.mark.usefixtures("without_reader")


@pytest.fixture
def small(smallest: Path, text_file: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Recipes of a run that takes a second."""

    def make(method: dict[str, Any] = SMALL_METHOD, **more: Any) -> Recipe:
        sections = {name: {**SMALL.get(name, {}), **more.get(name, {})} for name in {*SMALL, *more}}
        return recipe(smallest, tmp_path / "out", text_file, method, **sections)

    return make


# --- stopped, changed, damaged


class Interrupting(Silent):
    """Sends this process a signal when a block is done."""

    def __init__(self, block: str) -> None:
        self._block = block

    def advance(self, amount: int, note: str = "") -> None:
        if note.startswith(self._block):
            os.kill(os.getpid(), signal.SIGTERM)


class Counting(Silent):
    """Notes which blocks were compressed."""

    def __init__(self) -> None:
        self.blocks: list[str] = []

    def advance(self, amount: int, note: str = "") -> None:
        self.blocks += [note.partition(":")[0]] if note.startswith("block") else []


def interrupted(wanted: Recipe, block: str = "block 0") -> Path:
    """A run that a signal stopped after a block; returns its unfinished folder."""
    with pytest.raises(InterruptedRun, match="SIGTERM") as caught:
        run.execute(wanted, progress=Interrupting(block))
    assert caught.value.exit_code == 12 and "same command" in str(caught.value)
    assert wanted.output is not None
    assert not Path(wanted.output).exists()
    return Path(wanted.output + ".partial")


def finished(wanted: Recipe, **how: Any) -> tuple[dict[str, str], list[str]]:
    """What a run gives, and which blocks it still compressed; the output is moved away."""
    progress = Counting()
    run.execute(wanted, progress=progress, **how)
    assert wanted.output is not None
    out = Path(wanted.output)
    assert_complete(out)
    found = content(out)
    shutil.rmtree(out)
    return found, progress.blocks


@pytest.fixture(scope="module")
def expected(
    smallest: Path, text_file: Path, without_reader: None, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What an unbroken run of `small` gives."""
    return finished(recipe(smallest, tmp_path_factory.mktemp("unbroken") / "out", text_file, SMALL_METHOD, **SMALL))[0]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip_token(path: Path) -> None:
    text = path.read_text()
    at = text.index('"tokens"') + 30
    digit = next(i for i in range(at, len(text)) if text[i].isdigit())
    path.write_text(text[:digit] + str(9 - int(text[digit])) + text[digit + 1 :])


def test_a_signal_ends_the_run_after_the_block_and_the_same_recipe_goes_on(
    small: Callable[..., Recipe], expected: dict[str, str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    interrupted(small())
    assert signal.getsignal(signal.SIGTERM) == before
    found, blocks = finished(small())
    assert blocks == ["block 1"] and found == expected


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"method": {**SMALL_METHOD, "bits": 3}}, r"stages\.0\.method\.bits: 4 -> 3"),
        ({"calibration": {"samples": 3}}, r"samples: 4 -> 3"),
        ({"run": {"sequential": "subset"}}, r"sequential: 'block' -> 'subset'"),
    ],
)
def test_another_recipe_is_refused_with_the_difference(
    small: Callable[..., Recipe], changed: dict[str, Any], words: str
) -> None:
    partial = interrupted(small())
    files = {p: p.read_bytes() for p in partial.rglob("*") if p.is_file()}
    with pytest.raises(OutputError, match=words) as caught:
        run.execute(small(**changed), progress=Silent())
    assert caught.value.exit_code == 7
    assert {p: p.read_bytes() for p in partial.rglob("*") if p.is_file()} == files


def test_another_gate_is_no_other_run(small: Callable[..., Recipe], expected: dict[str, str]) -> None:
    interrupted(small(stage={"gate": {"max_size": "3GB"}}))
    assert finished(small(stage={"gate": {"max_size": "200%"}})) == (expected, ["block 1"])


def test_a_run_goes_on_with_the_text_it_began_with(
    small: Callable[..., Recipe], expected: dict[str, str], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the text is no longer there, or another is what `auto` would take now."""
    partial = interrupted(small())
    monkeypatch.setattr(TextLoader, "calibration", fail)
    with monkeypatch.context() as patch:
        patch.setattr(TextLoader, "evaluation", lambda *_: [])
        found, blocks = finished(small())
    assert blocks == ["block 1"] and found == expected
    assert not partial.exists()


@pytest.mark.parametrize("harm", [flip, flip_token, cut, Path.unlink])
def test_rows_that_were_damaged_are_made_again(
    small: Callable[..., Recipe], expected: dict[str, str], harm: Callable[[Path], None]
) -> None:
    harm(interrupted(small()) / WORK / job.ROWS)
    assert finished(small()) == (expected, ["block 1"])


def test_rows_of_another_recipe_are_not_taken(small: Callable[..., Recipe], expected: dict[str, str]) -> None:
    """The journal is gone, so that nothing else says whose rows they are."""
    partial = interrupted(small(calibration={"samples": 3}))
    (partial / WORK / "journal").unlink()
    assert finished(small()) == (expected, ["block 0", "block 1"])


def test_no_resume_starts_anew(small: Callable[..., Recipe]) -> None:
    interrupted(small())
    assert finished(small({**SMALL_METHOD, "bits": 3}, run={"resume": False}))[1] == ["block 0", "block 1"]


@pytest.mark.parametrize("harm", [flip, cut])
@pytest.mark.parametrize("name", [f"{WORK}/journal", "model-00002-of-00003.safetensors"])
def test_a_damaged_file_costs_one_block_and_changes_no_byte(
    small: Callable[..., Recipe], expected: dict[str, str], harm: Callable[[Path], None], name: str
) -> None:
    harm(interrupted(small(), "block 1") / name)
    found, blocks = finished(small())
    assert blocks == ["block 1"] and found == expected


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("harm", [None, flip, cut, Path.unlink, make_folder])
def test_hidden_states_that_were_saved_are_used_if_they_are_whole(
    small: Callable[..., Recipe],
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[Path], None] | None,
) -> None:
    again: list[int] = []
    forward = compress.Compressor._forward

    def counted(self: compress.Compressor, block: Block, decoded: Any) -> None:
        again.append(block.index)
        forward(self, block, decoded)

    monkeypatch.setattr(compress, "SAVE_EVERY", 0)
    partial = interrupted(small())
    if harm:
        harm(partial / WORK / "hidden-00000.safetensors")
    monkeypatch.setattr(compress.Compressor, "_forward", counted)
    told: list[str] = []
    monkeypatch.setattr(Counting, "event", lambda _, event: told.append(event.message))
    found, blocks = finished(small())
    assert blocks == ["block 1"] and found == expected
    assert again == ([0, 1] if harm else [1])
    assert [message.rpartition("/")[2] for message in told] == (
        ["hidden-00000.safetensors is damaged or gone: the forward passes since the last whole one are run again"]
        if harm
        else []
    )


def test_states_that_are_saved_again_under_their_name_stay(
    small: Callable[..., Recipe], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress, "SAVE_EVERY", 0)
    flip(interrupted(small()) / "model-00001-of-00003.safetensors")
    partial = interrupted(small())  # compresses block 0 again
    assert [p.name for p in (partial / WORK).glob("hidden-*")] == ["hidden-00000.safetensors"]
    assert finished(small()) == (expected, ["block 1"])


def test_files_of_a_run_nothing_is_known_about_do_not_get_into_the_output(
    small: Callable[..., Recipe], expected: dict[str, str]
) -> None:
    partial = interrupted(small())
    (partial / "model-00009-of-00009.safetensors").write_bytes(b"stale")
    cut(partial / WORK / "journal")
    (partial / WORK / "journal").write_bytes(b"no journal at all")
    assert finished(small()) == (expected, ["block 0", "block 1"])


# --- locks and outputs that are there already


def test_an_existing_output_is_left_alone(small: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("old")
    with pytest.raises(OutputError, match="exists already") as caught:
        run.execute(small(), progress=Silent())
    assert caught.value.exit_code == 7
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "precious"]


@pytest.mark.parametrize("failing", ["write_manifest", "rename"])
def test_overwrite_keeps_the_old_output_until_the_new_one_is_there(
    small: Callable[..., Recipe],
    expected: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("old")
    (out / workspace.MANIFEST).touch()
    with monkeypatch.context() as patch:
        if failing == "write_manifest":
            patch.setattr(workspace, failing, fail)
        else:
            rename = Path.rename
            patch.setattr(Path, failing, lambda a, b: fail() if a.name == "out.partial" else rename(a, b))
        with pytest.raises(OSError, match="no such luck"):
            run.execute(small(), progress=Silent(), overwrite=True)
    assert {p.name for p in out.iterdir()} == {"precious", workspace.MANIFEST}
    assert finished(small(), overwrite=True)[0] == expected
    assert list(tmp_path.iterdir()) == []


def fail(*_: object) -> None:
    raise OSError("no such luck")


def test_a_second_run_is_told_who_holds_the_output(small: Callable[..., Recipe], tmp_path: Path) -> None:
    with (
        workspace.Workspace(tmp_path / "out"),
        pytest.raises(OutputError, match=rf"process {os.getpid()} on ") as caught,
    ):
        run.execute(small(), progress=Silent())
    assert caught.value.exit_code == 7
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_dead_run_is_taken_over(small: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / ".out.lock").touch()
    (tmp_path / ".out.lock.json").write_text('{"pid": 1, "host": "elsewhere", "since": 0}')
    finished(small(SMALL_METHOD | {"name": "rtn"}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["", "inside", "../model", ".."])
def test_an_output_within_the_model_or_around_it_is_refused(smallest: Path, text_file: Path, place: str) -> None:
    before = sorted(smallest.parent.rglob("*"))
    with pytest.raises(OutputError) as caught:
        run.execute(recipe(smallest, smallest / place, text_file, SMALL_METHOD), progress=Silent())
    assert caught.value.exit_code == 7
    assert sorted(smallest.parent.rglob("*")) == before
