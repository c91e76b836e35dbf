"""Tokens in the environment, in arguments and in recipes reach no output, log, report, card or traceback."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub import Hub

from llmshrink.cli import main
from llmshrink.forms import Event
from llmshrink.job import Job
from llmshrink.recipe import load
from llmshrink.report.schema import Check

TOKEN = "hf_" + "CANARY0123456789abcdefCANARY"
PASSWORD = "pass word/with:CANARY\"quotes'"
ADDRESS = "https://user:hunter2CANARY@host.example/model"
SIGNED = "https://host.example/x?X-Amz-Signature=0123CANARY"
CANARY = "CANARY"
SETTINGS = ["--method", "rtn", "--group-size", "32", "--set", "evaluation.speed=false", "--verbose"]


@pytest.fixture(autouse=True)
def _secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("DATABASE_PASSWORD", PASSWORD)


@pytest.fixture
def call(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, without_reader: None
) -> Callable[..., str]:
    """Run a command, then look for the canary in all that it printed and wrote; gives what it printed."""

    def go(code: int, *arguments: str | Path) -> str:
        given = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["llmshrink", *given])
        found = main(given)
        shown = capfd.readouterr()
        said = shown.out + shown.err
        assert found == code, said
        assert CANARY not in said
        assert not [
            p for p in tmp_path.rglob("*") if CANARY in str(p) or (p.is_file() and CANARY.encode() in p.read_bytes())
        ]
        return said

    return go


def crash(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """A bug that quotes what it should not, deep in a run."""

    def fail(*_: object, **__: object) -> None:
        try:
            raise ValueError({"headers": {"authorization": f"Bearer {TOKEN}"}, "password": PASSWORD})
        except ValueError as error:
            raise ZeroDivisionError(f"bad luck with {' '.join(words)}") from error

    monkeypatch.setattr(Job, "_compress", fail)


@pytest.mark.parametrize("more", [[], ["--json"], ["--quiet"]], ids=str)
def test_a_crash(
    call: Callable[..., str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    crash(monkeypatch, TOKEN, PASSWORD, repr(PASSWORD), json.dumps(PASSWORD), ADDRESS, SIGNED)
    said = call(1, "quantize", model, *SETTINGS, "--set", "evaluation.data=[]", "--output", tmp_path / "out", *more)
    assert "Traceback" in said and "ZeroDivisionError" in said and "***" in said


def test_a_run_that_ends_well(
    call: Callable[..., str], hub: Hub, smallest: Path, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its report quotes the command, its events whatever a library said."""
    hub.add("models/owner/name", smallest, token=TOKEN)
    calibration = Job._calibration

    def eventful(self: Any, *arguments: Any) -> Any:
        words = f"said {TOKEN} {PASSWORD} {ADDRESS} {SIGNED}"
        self.loader.events.append(Event("noise", words, words))
        return calibration(self, *arguments)

    monkeypatch.setattr(Job, "_calibration", eventful)
    base = [
        "quantize",
        "owner/name",
        "--group-size",
        "32",
        "--calibration",
        text_file,
        "--samples",
        "4",
        "--length",
        "16",
    ]
    base += ["--evaluation", text_file, "--set", "evaluation.rows=2", "--set", "evaluation.speed=false", "--verbose"]
    for more in ([], ["--json"], ["--quiet"]):
        assert "***" in call(0, *base, "--output", tmp_path / "out", "--overwrite", *more) or more == ["--quiet"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "***" in str(report["events"]) and TOKEN in {request.token for request in hub.requests}
    assert r"said \*\*\*" in (tmp_path / "out" / "README.md").read_text()


def test_arguments_that_end_up_in_a_report(
    call: Callable[..., str], model: Path, tmp_path: Path, text_file: Path
) -> None:
    """A recipe may name a text, a column, a split that looks like a token: what people share does not."""
    settings = ["--calibration", text_file, "--samples", "4", "--length", "16", "--set", "evaluation.data=[]"]
    arguments = [
        "quantize",
        model,
        "--group-size",
        "32",
        "--set",
        "evaluation.speed=false",
        "--output",
        tmp_path / "out",
    ]
    keys = [
        f"calibration.split={TOKEN}",
        f"evaluation.column={json.dumps(ADDRESS)}",
        f"evaluation.split={json.dumps(PASSWORD)}",
    ]
    call(0, *arguments, *settings, *(word for key in keys for word in ("--set", key)))
    for name in ("report.json", "recipe.yaml", "README.md"):
        assert "***" in (tmp_path / "out" / name).read_text(), name
    recipe = load.read(str(tmp_path / "out" / "recipe.yaml"))  # it is YAML as before
    assert recipe["calibration"]["split"] == "***"
    assert recipe == json.loads((tmp_path / "out" / "report.json").read_text())["recipe"]


FAULTS: dict[str, tuple[dict[str, Any], int]] = {
    "refused": ({"part": "/revision/", "status": 403}, 4),
    "unauthorized": ({"part": "/revision/", "status": 401}, 4),
    "busy": ({"part": "/revision/", "status": 503, "times": 1000}, 4),
    "broken off": ({"part": "GET /cdn/", "cut": 100, "reset": True, "times": 1000}, 4),
    "gone": ({"part": "/tree/", "status": 404}, 4),
}


@pytest.mark.parametrize(("fault", "code"), FAULTS.values(), ids=FAULTS)
def test_a_hub_that_fails(
    call: Callable[..., str], hub: Hub, smallest: Path, waits: list[float], fault: dict[str, Any], code: int
) -> None:
    hub.add("models/owner/name", smallest, token=TOKEN)
    hub.fail(**fault)
    assert "Traceback" in call(code, "quantize", "owner/name", *SETTINGS)


def test_a_dataset_that_fails(
    call: Callable[..., str], hub: Hub, model: Path, tmp_path: Path, waits: list[float]
) -> None:
    hub.add("datasets/owner/texts", {"a.jsonl": b"{"}, token=TOKEN)
    arguments = ["quantize", model, *SETTINGS[2:], "--output", tmp_path / "out"]
    assert "Traceback" in call(4, *arguments, "--calibration", "owner/texts")
    hub.fail("/datasets/owner/texts", status=403, times=1000)
    assert "Traceback" in call(4, *arguments, "--calibration", "owner/texts")


ARGUMENTS: list[tuple[int, list[str]]] = [
    (4, ["--set", f"model.id={json.dumps(ADDRESS)}"]),
    (4, ["--set", f"model.id={TOKEN}/{TOKEN}"]),
    (3, ["--set", f"method.bits={TOKEN}"]),
    (3, ["--set", f"method.name={json.dumps(PASSWORD)}"]),
    (3, ["--set", f"ignore=['({TOKEN}']"]),
    (3, ["--set", f"layers={{'{TOKEN}': {{bits: 3}}}}"]),
    (3, ["--set", f"{TOKEN}=1"]),
    (2, ["--set", TOKEN]),
    (3, ["--format", TOKEN]),
    (3, ["--recipe", TOKEN]),
    (3, ["--recipe", ADDRESS]),
    (2, ["--device", TOKEN]),
    (2, [f"--{TOKEN}"]),
    (2, ["--bits", TOKEN]),
    (4, ["--calibration", f"{TOKEN}/{TOKEN}"]),
    (8, ["--calibration", f"/{TOKEN}/x.txt"]),
    (4, [ADDRESS]),
    (4, [SIGNED]),
]


@pytest.mark.parametrize(("code", "arguments"), ARGUMENTS, ids=lambda a: " ".join(a)[:30] if isinstance(a, list) else a)
@pytest.mark.parametrize("as_json", [False, True])
def test_an_argument_that_is_a_secret_is_not_repeated(
    call: Callable[..., str],
    model: Path,
    tmp_path: Path,
    waits: list[float],
    code: int,
    arguments: list[str],
    as_json: bool,
) -> None:
    named = any(word.startswith("model.id") for word in arguments) or arguments[0].startswith("https")
    more = ["--json"] if as_json else []
    settings = [] if "--recipe" in arguments else ["--method", "gptq"]
    call(
        code, "quantize", *([] if named else [model]), "--output", tmp_path / "out", "-v", *settings, *more, *arguments
    )


def test_a_recipe_that_quotes_a_secret(call: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path.parent / f"{tmp_path.name}-recipe.yaml"  # it holds the canary, and is not what was written
    for line in (f"seed: {TOKEN}", f"{TOKEN}: 1", f"samples: '{ADDRESS}'", f"data: {TOKEN} # \x07"):
        path.write_text(f"# {TOKEN}\nversion: 1\nstages: [{{task: quantize}}]\ncalibration:\n  {line}\n")
        call(3, "quantize", "--recipe", path, "-v")
        call(3, "recipes", "validate", path)
        call(0, "recipes", "show", path)
    path.unlink()


def test_a_check_that_fails_and_what_it_leaves(
    call: Callable[..., str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader's own words are those of a library."""
    words = f"died of {TOKEN} {PASSWORD} {ADDRESS}"
    monkeypatch.setattr("llmshrink.job.check_reader", lambda *_: Check(name="reader", passed=False, detail=words))
    said = call(9, "quantize", model, *SETTINGS, "--set", "evaluation.data=[]", "--output", tmp_path / "out")
    assert "died of ***" in said and (tmp_path / "out.partial").is_dir()
    shutil.rmtree(tmp_path / "out.partial")


def test_other_commands(call: Callable[..., str], model: Path, tmp_path: Path) -> None:
    call(0, "env", "--json")
    call(0, "plan", model, "--method", "rtn", "--group-size", "32", "--output", tmp_path / "out")
    call(8, "verify", tmp_path)
    call(0, "recipes", "ls")
