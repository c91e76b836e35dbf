"""Every command: what it hands to the library, what it prints where, and how it ends."""

import json
import os
import resource
import subprocess
import sys
from types import ModuleType

import pytest

import llmshrink
import llmshrink.report
from llmshrink import errors
from llmshrink.cli import console, main
from llmshrink.report.schema import Check


class Answer:
    """Stands for a Report or a Plan."""

    output = "out/model-gptq4"

    def model_dump(self, mode):
        assert mode == "json"
        return {"kind": "answer"}


@pytest.fixture
def library(monkeypatch):
    """The library's functions replaced: `calls` holds (function, recipe or folder, other arguments)."""
    run, table = ModuleType("llmshrink.run"), ModuleType("llmshrink.report.table")
    run.calls = []

    def answers(name, value):
        def function(subject, progress=None, **others):
            run.calls.append((name, subject, {k: v for k, v in others.items() if k != "command"}))
            if progress is not None:
                progress.start("compress", 10)
                progress.advance(10, "block 0")
                progress.finish()
            return value

        setattr(run, name, function)

    checks = [Check(name="hashes", passed=True, detail="3 files"), Check(name="logits", passed=True, detail="0")]
    for name, value in (("execute", Answer()), ("make_plan", Answer()), ("smoke", checks), ("verify", checks)):
        answers(name, value)
    run.check_gates = run.check_size = lambda answer: None
    run.environment = lambda: {"torch": "2.13", "device": "cpu"}
    table.render = lambda report: "REPORT TABLE"
    table.render_plan = lambda plan: "PLAN TABLE"
    table.render_checks = lambda checks: "CHECKS TABLE"
    monkeypatch.setitem(sys.modules, "llmshrink.run", run)
    monkeypatch.setattr(llmshrink, "run", run, raising=False)
    monkeypatch.setitem(sys.modules, "llmshrink.report.table", table)
    monkeypatch.setattr(llmshrink.report, "table", table, raising=False)
    return run


def last_recipe(library):
    return library.calls[-1][1]


def test_quantize_with_nothing_but_bits(library, capsys):
    assert main(["quantize", "--bits", "4"]) == 0
    name, recipe, others = library.calls[-1]
    assert (name, others) == ("execute", {"overwrite": False})
    assert recipe.model.id is None
    assert recipe.stages[0].method.settings == {"bits": 4}
    out, err = capsys.readouterr()
    assert out == "REPORT TABLE\nout/model-gptq4\n"
    assert "using the one inside llmshrink" in err
    assert "compress: done" in err


FLAGS = [
    ("--method rtn", lambda r: r.stages[0].method.name, "rtn"),
    ("--bits 3", lambda r: r.stages[0].method.settings["bits"], 3),
    ("--group-size 64", lambda r: r.stages[0].method.settings["group_size"], 64),
    ("--symmetric", lambda r: r.stages[0].method.settings["symmetric"], True),
    ("--asymmetric", lambda r: r.stages[0].method.settings["symmetric"], False),
    ("--format dense", lambda r: r.stages[0].format.name, "dense"),
    ("--calibration 010", lambda r: r.calibration.data, "010"),
    ("--samples 7", lambda r: r.calibration.samples, 7),
    ("--length 9", lambda r: r.calibration.length, 9),
    ("--seed 5", lambda r: r.calibration.seed, 5),
    ("--evaluation a.txt --evaluation b", lambda r: r.evaluation.data, ["a.txt", "b"]),
    ("--device cpu", lambda r: r.run.device, "cpu"),
    ("--threads 2", lambda r: r.run.threads, 2),
    ("--sequential subset", lambda r: r.run.sequential, "subset"),
    ("--max-ppl-increase 3%", lambda r: r.stages[0].gate.max_ppl_increase, 0.03),
    ("--max-kl 0.02", lambda r: r.stages[0].gate.max_kl, 0.02),
    ("--min-top1 97%", lambda r: r.stages[0].gate.min_top1, 0.97),
    ("--max-size 3.5GiB", lambda r: r.stages[0].gate.max_size.bytes, 3_758_096_384),
    ("-o here", lambda r: r.output, "here"),
    ("--revision abc", lambda r: r.model.revision, "abc"),
    ("--set method.damp=1e-3", lambda r: r.stages[0].method.settings["damp"], 1e-3),
    ("--set run.batch_tokens=5 --set run.threads=1", lambda r: (r.run.batch_tokens, r.run.threads), (5, 1)),
]


@pytest.mark.parametrize(("flags", "look", "expected"), FLAGS, ids=[f[0] for f in FLAGS])
@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_flags_are_names_for_recipe_keys(library, command, flags, look, expected):
    assert main([command, "some/model", *flags.split()]) == 0
    assert look(last_recipe(library)) == expected
    assert last_recipe(library).model.id == "some/model"


@pytest.mark.parametrize(
    ("command", "check", "words"),
    [
        ("quantize", "check_gates", "REPORT TABLE\nout/model-gptq4\n"),
        ("export some/model --to dense", "check_gates", "REPORT TABLE\nout/model-gptq4\n"),
        ("eval", "check_gates", "REPORT TABLE\n"),
        ("plan", "check_size", "PLAN TABLE\n"),
        ("quantize --plan", "check_size", "PLAN TABLE\n"),
        ("quantize --json", "check_gates", None),
        ("plan --json", "check_size", None),
    ],
)
def test_everything_is_shown_before_a_gate_fails(library, monkeypatch, capsys, command, check, words):
    def fail(answer):
        raise errors.GateError("1 gate failed")

    monkeypatch.setattr(library, check, fail)
    assert main(command.split()) == 9
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"kind": "answer"} if words is None else shown.out == words
    assert "1 gate failed" in shown.err
    if words is None:
        assert json.loads(shown.err.splitlines()[-1]) == {"code": 9, "error": "GateError", "message": "1 gate failed"}


def test_strict_and_resume(library):
    assert main(["quantize"]) == 0
    assert (last_recipe(library).run.strict, last_recipe(library).run.resume) == (False, True)
    assert main(["quantize", "--strict", "--no-resume", "--overwrite"]) == 0
    assert (last_recipe(library).run.strict, last_recipe(library).run.resume) == (True, False)
    assert library.calls[-1][2] == {"overwrite": True}


def test_recipe_then_flags_then_set(library, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "version: 1\nmodel: {id: theirs}\nrun: {strict: true}\n"
        "stages: [{task: quantize, method: {name: gptq, bits: 8, group_size: 64, damp: 0.5}}]"
    )
    settings = ["-r", str(path), "--bits", "3", "--group-size", "32", "--set", "method.group_size=16"]
    assert main(["quantize", "mine", *settings]) == 0
    recipe = last_recipe(library)
    assert recipe.stages[0].method.settings == {"bits": 3, "group_size": 16, "damp": 0.5}
    assert recipe.model.id == "mine"
    assert recipe.run.strict
    assert main(["quantize", *settings]) == 0
    assert last_recipe(library).model.id == "theirs"


def test_flags_of_calibration_where_nothing_is_calibrated(library, capsys):
    for given in (["--calibration", "missing.json"], ["--sequential", "block"], ["--seed", "1"]):
        assert main(["lora", "mine", *given]) == 2
        assert f"{given[0]} is about calibration, and nothing is calibrated" in capsys.readouterr().err
        assert not library.calls
    assert main(["lora", "mine", "--merge", "--calibration", "some.json"]) == 0
    assert last_recipe(library).calibration.data == "some.json"


@pytest.mark.parametrize(("arguments", "called"), [(["quantize", "--plan"], "make_plan"), (["plan"], "make_plan")])
def test_plan(library, capsys, arguments, called):
    assert main(arguments) == 0
    assert library.calls[-1][0] == called
    assert capsys.readouterr().out == "PLAN TABLE\n"


def test_smoke_and_verify(library, capsys, tmp_path):
    assert main(["quantize", "--smoke"]) == 0
    assert library.calls[-1][0] == "smoke"
    assert main(["verify", str(tmp_path)]) == 0
    assert library.calls[-1][:2] == ("verify", tmp_path)
    assert capsys.readouterr().out == "CHECKS TABLE\n" * 2


def test_a_failed_check_is_exit_9(library, capsys, tmp_path):
    library.verify = lambda folder, progress: [Check(name="hashes", passed=False, detail="x")]
    assert main(["verify", str(tmp_path), "--json"]) == 9
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "passed": False,
        "checks": [{"name": "hashes", "passed": False, "detail": "x", "value": None}],
    }
    assert "1 of 1 checks failed: hashes" in err


def test_eval(library, capsys):
    assert main(["eval", "m", "--evaluation", "a", "--rows", "3", "--length", "7"]) == 0
    recipe = last_recipe(library)
    assert [s.task for s in recipe.stages] == ["eval"]
    assert (recipe.evaluation.data, recipe.evaluation.rows, recipe.evaluation.length) == (["a"], 3, 7)
    assert capsys.readouterr().out == "REPORT TABLE\n"
    assert main(["eval", "m", "-r", "eval"]) == 0


def test_export(library, capsys):
    assert main(["export", "some/model", "--to", "dense", "-o", "here"]) == 0
    recipe = last_recipe(library)
    assert [(s.task, s.format.name) for s in recipe.stages] == [("export", "dense")]
    assert (recipe.model.id, recipe.output) == ("some/model", "here")
    assert recipe.evaluation.data == [] and not recipe.evaluation.speed, "the codes are the same"
    assert main(["export", "some/model", "--to", "dense", "--evaluation", "a.txt"]) == 0
    assert last_recipe(library).evaluation.data == ["a.txt"]
    assert "auto" not in capsys.readouterr().err
    assert main(["export", "some/model", "--to", "dense", "--max-size", "30%"]) == 0
    assert last_recipe(library).evaluation.data == []
    assert main(["export", "some/model", "--to", "dense", "--max-kl", "0.01"]) == 0
    assert last_recipe(library).evaluation.data == ["auto"] and not last_recipe(library).evaluation.speed
    assert "evaluated on `auto` text" in capsys.readouterr().err
    assert main(["export", "some/model", "--to", "dense", "--max-kl", "0.01", "--evaluation", "a.txt"]) == 0
    assert last_recipe(library).evaluation.data == ["a.txt"] and "auto" not in capsys.readouterr().err
    assert main(["export", "some/model", "--to", "dense", "--plan"]) == 0
    assert library.calls[-1][0] == "make_plan"
    capsys.readouterr()
    assert main(["export", "--to", "dense"]) == 2 and "name the model" in capsys.readouterr().err
    assert main(["export", "some/model"]) == 2 and "--to dense" in capsys.readouterr().err
    assert main(["export", "some/model", "--to", "gtpq"]) == 3 and "gptq" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["eval", "-r", "gptq-w8"], ["quantize", "-r", "eval"], ["plan", "-r", "eval"]])
def test_a_recipe_of_another_command_is_refused(library, capsys, arguments):
    assert main(arguments) == 2
    assert library.calls == []
    assert f"{arguments[-1]} is for llmshrink" in capsys.readouterr().err


def test_quiet_prints_only_the_path(library, capsys):
    assert main(["quantize", "-q"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("out/model-gptq4\n", "")


@pytest.mark.parametrize("command", ["quantize", "plan", "eval"])
def test_json_alone_on_stdout(library, capsys, command):
    assert main([command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"kind": "answer"}


def test_env(library, capsys):
    assert main(["env"]) == 0
    assert capsys.readouterr().out == "torch: 2.13\ndevice: cpu\n"
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"] == "2.13"


KNOWN = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.LlmshrinkError)]


@pytest.mark.parametrize("error", KNOWN)
def test_known_errors(library, capsys, error):
    def fail(recipe, progress, overwrite, command):
        progress.start("compress", 10)
        raise error("what went wrong", hint="what to do")

    library.execute = fail
    assert main(["quantize", "m"]) == error.exit_code
    out, err = capsys.readouterr()
    assert (out, err) == ("", "llmshrink: what went wrong\n  what to do\n")
    assert main(["quantize", "m", "--json"]) == error.exit_code
    out, err = capsys.readouterr()
    assert out == ""
    told = json.loads(err.splitlines()[-1])
    assert told == {"code": error.exit_code, "error": error.__name__, "message": "what went wrong\n  what to do"}
    assert main(["quantize", "m", "--verbose"]) == error.exit_code
    assert "Traceback" in capsys.readouterr().err


def test_unexpected_errors(library, capsys):
    def fail(recipe, progress, overwrite, command):
        raise ZeroDivisionError("oh")

    library.execute = fail
    assert main(["quantize", "m"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("llmshrink: internal error: ZeroDivisionError: oh\n")
    assert "--verbose" in err
    assert "Traceback" not in err
    assert main(["quantize", "m", "-v"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_that_no_one_catches(library):
    def stop(recipe, progress, overwrite, command):
        raise KeyboardInterrupt

    library.execute = stop
    assert main(["quantize", "m"]) == 130


def test_all_recipe_problems_come_before_any_work(library, capsys):
    assert main(["quantize", "--bits", "5", "--sequential", "layer", "--set", "run.thread=1", "--json"]) == 3
    assert library.calls == []
    told = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert told["problems"] == [
        "stages[0].method.bits: Input should be 2, 3, 4 or 8; got 5",
        "run.sequential: Input should be 'block' or 'subset'; got 'layer'",
        "run.thread: unknown key; did you mean 'threads'?",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantise"], "'quantize'"),
        (["quantize", "--bit", "4"], "--bits"),
        (["quantize", "--bits", "four"], "integer"),
        (["quantize", "a", "b"], "unexpected extra argument"),
        (["verify"], "DIR"),
        (["quantize", "--set", "method.bits"], "path=value"),
        (["quantize", "--plan", "--smoke"], "one at a time"),
        (["recipes", "lss"], "'ls'"),
    ],
)
def test_usage_errors(library, capsys, arguments, message):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("llmshrink: ")


def test_version_and_no_arguments(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{llmshrink.__version__}\n"
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert "Usage: llmshrink" in out
    assert err == ""


def test_help_is_quick_and_imports_nothing_slow():
    code = (
        "import sys; from llmshrink.cli import main; main(['--help']); main(['quantize', '--help']);"
        "slow = {'torch', 'transformers', 'yaml', 'numpy'} & set(sys.modules); sys.exit(f'{slow}' if slow else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "llmshrink", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5  # processor time: a busy machine does not change it


def complete(words):
    environment = {**os.environ, "_LLMSHRINK_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words)}
    environment["COMP_CWORD"] = str(len(words) - 1)
    code = (
        "import sys; from llmshrink.cli import main\ntry: main()\n"
        "finally: assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "AssertionError" not in done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["llmshrink", "quantize", "-r", "gptq-w4"], ["gptq-w4g128", "gptq-w4g128-asym"]),
        (["llmshrink", "plan", "--method", "nf"], ["nf4"]),
        (["llmshrink", "quantize", "--format", "den"], ["dense"]),
        (["llmshrink", "recipes", "show", "rtn-w8"], ["rtn-w8", "rtn-w8g128"]),
        (["llmshrink", "quan"], ["quantize"]),
    ],
)
def test_completion(words, expected):
    assert complete(words) == expected


def test_an_interrupt_while_an_error_is_told_needs_no_more_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(console, "report_error", interrupted)
    assert main(["quantize", "--bits", "5"]) == 130
    assert "Traceback" not in capsys.readouterr().err
