"""Gates through the command line: refused before compute, or judged on what was measured; the result is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_complete
from safetensors.torch import load_file, save_file

from llmshrink.cli import main
from llmshrink.errors import InputError
from llmshrink.evaluate import measure
from llmshrink.report.schema import Report

pytestmark = pytest.mark.usefixtures("without_reader")

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(tmp_path: Path, text_file: Path, other_text: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    """A command with small texts; gives its exit code, stdout and stderr. `texts` False: without evaluation."""

    def run_it(command: str, *arguments: str | Path, texts: bool = True) -> tuple[int, str, str]:
        more = ["--set", "evaluation.rows=4", "--set", "evaluation.length=24", "--set", "evaluation.speed=false"]
        more += ["--evaluation", text_file, "--evaluation", other_text] if texts else []
        if command == "quantize":
            more += ["--output", tmp_path / "out", "--calibration", text_file, "--samples", "4", "--length", "16"]
            more += ["--group-size", "32", "--method", "rtn"]
        code = main([str(argument) for argument in [command, *arguments, *more]])
        return code, *capsys.readouterr()

    return run_it


def files_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def written(folder: Path) -> Report:
    return Report.model_validate_json((folder / "report.json").read_bytes())


def test_the_verdicts_are_those_of_the_report_by_hand(call: Call, smallest: Path, tmp_path: Path) -> None:
    gates = ["--max-ppl-increase", "900%", "--max-kl", "1e-9", "--min-top1", "99.9%", "--max-size", "90%"]
    code, out, err = call("quantize", smallest, *gates)
    assert code == 9 and "2 gates failed; the result is in" in err
    assert "FAILED" in out and "max_kl" in out.partition("Gates")[2]
    folder = tmp_path / "out"
    assert_complete(folder)
    report = written(folder)
    assert report.before is not None and report.after is not None
    pairs = list(zip(report.before.scores, report.after.scores, strict=True))
    assert len(pairs) == 2
    by_hand = {
        "max_ppl_increase": (9.0, max(new.perplexity / old.perplexity - 1 for old, new in pairs), True),  # type: ignore[operator]
        "max_kl": (1e-9, max(new.kl for _, new in pairs), False),  # type: ignore[type-var]
        "min_top1": (0.999, min(new.top1 for _, new in pairs), False),  # type: ignore[type-var]
        "max_size": (int(0.9 * files_size(smallest)), files_size(folder), True),
    }
    assert {g.name: (g.limit, g.value, g.passed) for g in report.stages[0].gates} == by_hand
    assert report.recipe["stages"][0]["gate"]["max_size"] == "90%"
    card = (folder / "README.md").read_text()
    assert "## Gates" in card and str(tmp_path) not in card


def test_a_result_that_keeps_to_its_gates(call: Call, smallest: Path) -> None:
    gates = ["--bits", "8", "--max-ppl-increase", "50%", "--max-kl", "0.5", "--min-top1", "50%", "--max-size", "1GB"]
    code, out, _ = call("quantize", smallest, *gates)
    assert code == 0 and "FAILED" not in out and out.partition("Gates")[2].count("ok  ") == 4


def test_a_failed_gate_in_json(call: Call, smallest: Path) -> None:
    code, out, err = call("quantize", smallest, "--max-kl", "0", "--json")
    (gate,) = json.loads(out)["stages"][0]["gates"]
    assert (code, gate["name"], gate["passed"]) == (9, "max_kl", False) and gate["value"] > 0
    assert json.loads(err.splitlines()[-1])["code"] == 9


@pytest.mark.parametrize("more", [[], ["--plan"]])
def test_a_size_that_cannot_be_kept_costs_no_compute(
    call: Call, smallest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    code, _, err = call("quantize", smallest)
    assert code == 0
    size = files_size(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr("llmshrink.job.Compressor", None)
    code, out, err = call("quantize", smallest, "--max-size", str(size - 1), *more)
    assert code == 9 and f"planned with {size:,} bytes, and {size - 1:,} are allowed" in err
    assert ("TOO LARGE" in out) == bool(more)
    assert list(tmp_path.iterdir()) == []
    assert call("quantize", smallest, "--max-size", str(size), "--plan")[0] == 0


REFUSED: list[tuple[str, str, list[str], str]] = [
    ("quantize", "smallest", ["--max-kl", "1", "--set", "evaluation.data=[]"], "--evaluation auto"),
    ("quantize", "smallest", ["--min-top1", "1%", "--set", "evaluation.data=[]", "--plan"], "--evaluation auto"),
    ("quantize", "smallest", ["--min-top1", "1%", "--set", "evaluation.data=[]", "--smoke"], "--evaluation auto"),
    ("eval", "smallest", ["--max-kl", "1"], "max_kl cannot be judged without another model"),
    ("eval", "smallest", ["--max-size", "30%"], "--baseline"),
    ("quantize", "bert", ["--max-kl", "1"], "max_kl cannot be asked of BertModel: its hidden states"),
    ("quantize", "bert", ["--min-top1", "1%"], "Gates for it: max_size."),
    ("quantize", "bert-masked", ["--max-ppl-increase", "3%"], "its logits give no perplexity"),
    ("quantize", "bert-masked", ["--max-ppl-increase", "3%"], "Gates for it: max_kl, min_top1 and max_size."),
]


@pytest.mark.parametrize(("command", "family", "arguments", "words"), REFUSED)
def test_what_could_not_be_answered_is_refused_before_compute(
    call: Call,
    smallest: Path,
    models_folder: Callable[..., Path],
    tmp_path: Path,
    command: str,
    family: str,
    arguments: list[str],
    words: str,
) -> None:
    folder = smallest if family == "smallest" else models_folder(family)
    code, _, err = call(command, folder, *arguments)
    assert code == 3 and words in err and list(tmp_path.iterdir()) == []


def test_an_encoder_is_gated_by_what_is_measured_of_it(
    call: Call, models_folder: Callable[..., Path], tmp_path: Path
) -> None:
    arguments = [models_folder("bert-masked"), "--bits", "8", "--max-kl", "0.5", "--min-top1", "100%"]
    code, _, err = call("quantize", *arguments, "--max-size", "99%")
    report = written(tmp_path / "out")
    assert report.before is not None and report.after is not None and report.before.scores == []
    found = {gate.name: gate for gate in report.stages[0].gates}
    assert found["max_kl"].passed and found["max_kl"].value == max(s.kl or 0 for s in report.after.scores)
    assert found["min_top1"].value == min(s.top1 or 0 for s in report.after.scores)
    assert code == (0 if found["min_top1"].value == 1 else 9), err


def test_evaluation_compares_with_its_baseline(call: Call, smallest: Path, tmp_path: Path) -> None:
    assert call("quantize", smallest, "--bits", "8", "--max-kl", "1")[0] == 0
    made = written(tmp_path / "out")
    gates = ["--max-kl", "1", "--max-ppl-increase", "50%", "--max-size", "90%"]
    code, out, _ = call("eval", tmp_path / "out", "--baseline", smallest, *gates, "--json")
    stage = Report.model_validate_json(out).stages[0]
    assert code == 0 and all(gate.passed for gate in stage.gates)
    values = {gate.name: gate.value for gate in stage.gates}
    assert values["max_kl"] == pytest.approx(made.stages[0].gates[0].value, rel=1e-4)
    assert values["max_size"] == files_size(tmp_path / "out")
    code, out, err = call("eval", smallest, "--max-size", "1kB", texts=False)
    assert code == 9 and "FAILED" in out and "1 gate failed:" in err, "a size alone needs no other model"


def test_a_model_that_got_better_is_not_believed(call: Call, smallest: Path, tmp_path: Path) -> None:
    """The original is broken: its logits are seven times too sharp, so the other model looks better."""
    broken = shutil.copytree(smallest, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["lm_head.weight"] *= 7
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    code, out, err = call("eval", smallest, "--baseline", broken, "--max-ppl-increase", "20%")
    assert code == 9 and "an implausible gain" in err and "FAILED" in out


def test_what_was_not_measured_fails_and_is_kept(
    call: Call, smallest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise InputError("the logits are not finite")

    monkeypatch.setattr(measure, "score_texts", fail)
    code, _, err = call("quantize", smallest, "--max-kl", "9")
    why = "quality of the result: the logits are not finite; quality of the original: the logits are not finite"
    assert code == 9 and f"max_kl: not measured, asked at most 9.00000 ({why})" in err
    assert_complete(tmp_path / "out")


def test_the_same_codes_keep_to_a_gate(call: Call, smallest: Path, tmp_path: Path) -> None:
    assert call("quantize", smallest, texts=False)[0] == 0
    arguments = [tmp_path / "out", "--to", "dense", "--output", tmp_path / "dense"]
    code, out, _ = call("export", *arguments, "--max-kl", "0.001", "--max-ppl-increase", "1%")
    assert code == 0 and out.partition("Gates")[2].count("ok  ") == 2


def test_trying_one_block_asks_no_gate(call: Call, smallest: Path) -> None:
    assert call("quantize", smallest, "--max-kl", "0", "--max-size", "1kB", "--smoke")[0] == 0


def test_an_eval_stage_behind_another_has_gates_of_its_own(call: Call, smallest: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("version: 1\nstages:\n- {task: eval, gate: {max_kl: 0}}\n- {task: quantize, gate: {max_kl: 9}}\n")
    code, _, err = call("quantize", smallest, "-r", recipe, "--max-size", "90%")
    first, second = written(tmp_path / "out").stages
    assert code == 9 and "1 gate failed" in err
    assert [(gate.name, gate.passed) for gate in first.gates] == [("max_kl", True), ("max_size", True)]
    assert (second.task, [(gate.name, gate.passed) for gate in second.gates]) == ("eval", [("max_kl", False)])
