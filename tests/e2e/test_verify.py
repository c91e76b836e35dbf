"""`llmshrink verify` on finished folders: whole ones pass, and whatever was changed, lost or added is named."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import SMALL, SMALL_METHOD, recipe
from safetensors.torch import load_file, save_file

from llmshrink import run
from llmshrink.checks import finished
from llmshrink.cli import main
from llmshrink.engine.workspace import MANIFEST, WORK, write_manifest
from llmshrink.errors import InputError, UnsafeError
from llmshrink.progress import Silent
from llmshrink.report.schema import Check

pytestmark = pytest.mark.usefixtures("without_reader")


@pytest.fixture(autouse=True)
def _without_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    left_out = Check(name="reader", passed=True, detail="left out")
    monkeypatch.setattr(finished, "check_reader", lambda *_: left_out)


NAMES = ["manifest", "files", "hashes", "documents", "decode", "reader"]
DOCUMENTS = {"README.md", "recipe.yaml", "report.json"}


@pytest.fixture(scope="module")
def made(smallest: Path, text_file: Path, without_reader: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output that no test may spoil."""
    folder = tmp_path_factory.mktemp("made") / "out"
    run.execute(recipe(smallest, folder, text_file, SMALL_METHOD, **SMALL), progress=Silent())
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "out")


def checks(folder: Path) -> dict[str, Check]:
    return {check.name: check for check in run.verify(folder, progress=Silent())}


def failed(folder: Path) -> dict[str, str]:
    return {name: check.detail for name, check in checks(folder).items() if check.passed is False}


def test_a_whole_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["passed"] and [(check["name"], check["passed"]) for check in told["checks"]] == [
        (name, True) for name in NAMES
    ]
    (folder.parent / "link").symlink_to(folder)
    assert failed(folder.parent / "link") == {}, "the folder itself may be a link"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


HARM: dict[str, Callable[[Path], None]] = {
    "flipped": flip,
    "one byte less": lambda path: os.truncate(path, path.stat().st_size - 1),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 1),
    "gone": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir())[0],
}


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM)
def test_every_file_counts(
    made: Path, folder: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None]
) -> None:
    names = sorted(path.name for path in made.iterdir() if path.name != MANIFEST)
    assert set(names) > DOCUMENTS and "config.json" in names and "tokenizer.json" in names
    for name in names:
        harm(folder / name)
        found = checks(folder)
        wrong = found["documents" if name in DOCUMENTS else "hashes"]
        assert wrong.passed is False and name in wrong.detail
        assert found["hashes"].passed == (name in DOCUMENTS)
        assert found["decode"].passed == found["reader"].passed == (True if name in DOCUMENTS else None)
        assert (found["files"].passed, name in found["files"].detail) == (harm is flip, harm is not flip)
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink(missing_ok=True)
        shutil.copy(made / name, folder / name)
    harm(folder / names[-1])
    assert main(["verify", str(folder)]) == 9
    out, err = capsys.readouterr()
    assert "FAILED" in out and "checks failed: " in err
    if harm not in (HARM["gone"], HARM["a folder"]):
        harm(folder / MANIFEST)
        assert main(["verify", str(folder)]) == 9
        assert "manifest" in capsys.readouterr().err


def test_no_bit_of_the_manifest_may_differ(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finished, "_check_model", lambda _: [])
    manifest = folder / MANIFEST
    whole = manifest.read_bytes()
    draw = random.Random(0)
    for at in draw.sample(range(len(whole)), 150):
        manifest.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
        assert failed(folder), at
    manifest.write_bytes(json.dumps(json.loads(whole)).encode())
    assert failed(folder) == {"manifest": f"{MANIFEST} is not as it was written"}


def test_a_card_that_was_edited_is_told_apart_from_weights(folder: Path) -> None:
    with (folder / "README.md").open("a") as card:
        card.write("\nMine.\n")
    assert failed(folder) == {"files": "of another size: README.md", "documents": "changed or missing: README.md"}


@pytest.mark.parametrize("name", ["adapter_config.json", "pytorch_model.bin", "1_Pooling/config.json", "notes.md"])
def test_what_was_added_is_named(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    assert failed(folder) == {"files": f"not listed: {name}"}


def test_what_git_the_hub_and_a_killed_run_leave_is_no_fault(folder: Path) -> None:
    for name in (".gitattributes", ".cache/huggingface/download.lock", f"{WORK}/journal"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    assert failed(folder) == {}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def put_nan(folder: Path) -> None:
    path = next(p for p in sorted(folder.glob("*.safetensors")) if "model.norm.weight" in load_file(p))
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})


FORGED: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "no report": (
        lambda f: edit(f / "report.json", '"stages"', '"stagse"'),
        "documents",
        "report.json is no report: stag",
    ),
    "another report": (lambda f: edit(f / "report.json", '"bits": 4', '"bits": 3'), "documents", "not the recipe of"),
    "another recipe": (lambda f: edit(f / "recipe.yaml", "bits: 4", "bits: 3"), "documents", "not the recipe of"),
    "no recipe": (lambda f: edit(f / "recipe.yaml", "stages:", "stagse:"), "documents", "did you mean 'stages'?"),
    "report lost": (lambda f: (f / "report.json").unlink(), "documents", "report.json: No such file"),
    "config": (
        lambda f: edit(f / "config.json", '"hidden_size": 32', '"hidden_size": 48'),
        "decode",
        "config.json asks for [160, 48]",
    ),
    "nan": (put_nan, "decode", "not finite: model.norm.weight"),
}


@pytest.mark.parametrize(("forge", "check", "words"), FORGED.values(), ids=FORGED)
def test_hashes_that_were_made_anew_do_not_help(
    folder: Path, forge: Callable[[Path], None], check: str, words: str
) -> None:
    forge(folder)
    (folder / MANIFEST).unlink()
    write_manifest(folder)
    found = failed(folder)
    assert set(found) == {check} and words in found[check]
    assert main(["verify", str(folder)]) == 9


def test_what_is_no_output(folder: Path, smallest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, words in (
        (smallest, f"has no {MANIFEST}: it is not an output of llmshrink.\n  `verify` checks what"),
        (folder / "nothing", "There is no folder"),
        (folder / "config.json", "There is no folder"),
    ):
        assert main(["verify", str(path), "--json"]) == 8
        out, err = capsys.readouterr()
        assert out == "" and words in err


def test_the_folder_one_is_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert all(check.passed for check in run.verify(Path(), progress=Silent()))


@pytest.mark.parametrize("listed", [True, False])
def test_what_is_not_finished(folder: Path, capsys: pytest.CaptureFixture[str], listed: bool) -> None:
    """Before the manifest is written, and between that and the rename."""
    partial = folder.rename(folder.with_name("out.partial"))
    (partial / WORK).mkdir()
    if not listed:
        (partial / MANIFEST).unlink()
    for path in (partial, folder):
        assert main(["verify", str(path)]) == 8
        err = capsys.readouterr().err
        assert f"{partial} is the work of a run that has not finished" in err and "command of that run again" in err


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "", "./config.json"])
def test_names_that_no_file_can_have(folder: Path, name: str) -> None:
    entries = json.loads((folder / MANIFEST).read_bytes())
    entries["files"][name] = entries["files"]["config.json"]
    (folder / MANIFEST).write_text(json.dumps(entries, indent=2) + "\n")
    assert set(failed(folder)) == {"files", "hashes"}


def test_a_name_that_is_not_utf8(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path(os.fsdecode(bytes(folder) + b"/\xff.json")).write_text("{}")
    for more in ([], ["--json"]):
        assert main(["verify", str(folder), *more]) == 9
        assert "not listed: ?.json" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..\\secret"])
def test_a_manifest_that_names_files_elsewhere(folder: Path, name: str) -> None:
    entries = json.loads((folder / MANIFEST).read_bytes())
    entries["files"][name] = entries["files"]["config.json"]
    (folder / MANIFEST).write_text(json.dumps(entries))
    with pytest.raises(InputError, match="names a file outside its folder"):
        run.verify(folder, progress=Silent())


@pytest.mark.parametrize("name", ["config.json", "README.md", "1_Pooling"])
def test_links_out_of_the_folder(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / MANIFEST).unlink()
    write_manifest(folder)
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeError, match=f"{name} is a link out of"):
        run.verify(folder, progress=Silent())
