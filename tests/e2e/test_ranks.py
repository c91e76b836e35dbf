"""Several processes that train one model: as one process would, together stopped and together gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import content, load
from peft import PeftModel
from ranks_server import Ended, RanksServer
from safetensors.torch import load_file
from tiny import build_model, config

from llmshrink import run
from llmshrink.cli import main
from llmshrink.evaluate.reader import read as read_one
from llmshrink.progress import Silent
from llmshrink.recipe.load import dump, read, validate
from llmshrink.report.schema import Report, TrainReport

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
SHARDED = ["accelerate", "launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "1"]
SHARDED += ["--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
CASES = Path(__file__).with_name("ranks_cases.py")
pytestmark = pytest.mark.usefixtures("without_reader")


@pytest.fixture(scope="module")
def server() -> Iterator[RanksServer]:
    with RanksServer() as one:
        yield one


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama of three layers."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    small = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
    build_model(folder, config("llama-tied", num_hidden_layers=3, **small))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, deep: Path, text_file: Path) -> Any:
    """A function of settings of the training -> the file of a recipe, and where its result goes."""
    folder = tmp_path_factory.mktemp("ranks")

    def make(name: str, **train: Any) -> tuple[Path, Path]:
        steps = {"data": str(text_file), "length": 16, "batch": 2, "max_steps": 6, "rate": 1e-3, "hold": "25%", **train}
        steps["seed"] = 1  # rows held back are whole batches of both: else one counts twice, and means differ a little
        stage = {"task": "distill", "student": {"layers": [0, 2], "repair": False}, "train": steps}
        wanted = {
            "version": 1,
            "model": {"id": str(deep)},
            "stages": [stage],
            "evaluation": {"data": [], "speed": False},
            "run": {"threads": 1},
            "output": str(folder / name),
        }
        (folder / f"{name}.yaml").write_text(dump(validate(wanted)))
        return folder / f"{name}.yaml", folder / name

    return make


@pytest.fixture(scope="module")
def whole(server: RanksServer, made: Any) -> tuple[Path, list[Ended]]:
    """What two processes give that nobody disturbs."""
    recipe, out = made("whole", save_minutes=1e-6)
    return out, server.run("command", out.with_name("said-whole"), arguments=["distill", "-r", str(recipe)])


@pytest.fixture(scope="module")
def adapting(tmp_path_factory: pytest.TempPathFactory, deep: Path, text_file: Path) -> Any:
    """A function of what learns and how -> the file of a recipe, and where its result goes."""
    folder = tmp_path_factory.mktemp("adapting")
    classes = folder / "classes.jsonl"  # lines of several lengths: batches differ in tokens
    words = text_file.read_text().split()
    lines = [{"text": " ".join(words[5 * i : 5 * i + 1 + i % 4]), "kind": "ab"[i % 2]} for i in range(60)]
    classes.write_text("".join(json.dumps(line) + "\n" for line in lines))
    wide = folder / "model"  # enough so for four bits

    def make(name: str, method: Any, stage: Any = (), **train: Any) -> tuple[Path, Path]:
        told, model = dict(stage), deep
        if method["name"] in ("qlora", "loftq"):
            model = wide
            if not model.is_dir():
                build_model(model, config("llama", hidden_size=64, intermediate_size=64))
        steps = {
            "data": str(classes),
            "length": 16,
            "packing": False,
            "batch": 2,
            "max_steps": 6,
            "rate": 1e-2,
            "save_minutes": 1e-6,
            **train,
        }
        wanted = {
            "version": 1,
            "model": {"id": str(model)},
            "stages": [{"task": "lora", "method": method, "train": {"hold": "25%", **steps}, **told}],
            "evaluation": {"data": [], "speed": False},
            "run": {"threads": 1},
            "output": str(folder / name),
        }
        (folder / f"{name}.yaml").write_text(dump(validate(wanted)))
        return folder / f"{name}.yaml", folder / name

    return make


@pytest.fixture
def read_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read adapters in this process: starting another one takes seconds."""
    monkeypatch.setattr("llmshrink.checks.adapter.measure", lambda requests: [read_one(one) for one in requests])


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(out.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def alike(out: Path, alone: Path) -> None:
    """What two processes learned is what one learned from batches twice as large."""
    found, right = trained(out), trained(alone)
    assert (found.steps, found.tokens, found.rows) == (right.steps, right.tokens, right.rows)
    assert (found.processes, right.processes) == (2, 1)
    assert len(found.curve) == len(right.curve) > 0
    for point, other in zip(found.curve, right.curve, strict=True):
        assert (point.step, point.kind) == (other.step, other.kind)
        assert point.value == pytest.approx(other.value, rel=1e-4)
    assert found.held_after == pytest.approx(right.held_after, rel=1e-4)
    mine, other_tensors = tensors(out), tensors(alone)
    assert mine.keys() == other_tensors.keys()
    assert max(float((value - other_tensors[name]).abs().max()) for name, value in mine.items()) < 3e-4


def environment() -> dict[str, str]:
    """Of a launcher, which finds this Python, and in it the cases."""
    here, scripts = Path(__file__).parent, Path(sys.executable).parent
    path = os.pathsep.join(map(str, (here.parents[1], here.parent, here)))
    found = f"{scripts}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": found, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def trained(out: Path) -> TrainReport:
    found = Report.model_validate_json((out / "report.json").read_bytes()).stages[0].trained
    assert found is not None
    return found


def test_two_processes_train_as_one_does(whole: tuple[Path, list[Ended]], made: Any) -> None:
    out, ended = whole
    assert [one.code for one in ended] == [0, 0], ended
    assert [one.found for one in ended] == [["DistributedDataParallel"] * 6] * 2
    assert ended[0].said.endswith(f"{out}\n") and "distill: done" in ended[0].said and ended[1].said == ""
    recipe, alone = made("alone", batch=4, save_minutes=1e-6)
    run.execute(validate(read(str(recipe))), progress=Silent())
    found, right = trained(out), trained(alone)
    assert (found.steps, found.tokens, found.rows) == (right.steps, right.tokens, right.rows) == (6, 384, right.rows)
    assert (found.processes, right.processes) == (2, 1)
    for point, other in zip(found.curve, right.curve, strict=True):
        assert (point.step, point.kind) == (other.step, other.kind)
        assert point.value == pytest.approx(other.value, rel=1e-4)
    assert found.held_before == pytest.approx(right.held_before, rel=1e-5)
    (model, info), (other, _) = load(out), load(alone)
    assert not info["missing_keys"] and model.config.tie_word_embeddings
    weights = other.state_dict()
    assert all(torch.allclose(value, weights[name], atol=1e-4) for name, value in model.state_dict().items())


@pytest.mark.slow  # adapters are stopped by default, on the same way
def test_they_stop_together_and_go_on(
    server: RanksServer, whole: tuple[Path, list[Ended]], made: Any, tmp_path: Path
) -> None:
    recipe, out = made("stopped", save_minutes=1e-6)
    for at, (signals, codes, said) in enumerate(
        [
            ({"1": signal.SIGTERM}, [12, 12], "Another process of this run was stopped.\n  The same command goes on"),
            ({"1": signal.SIGKILL}, [12, -signal.SIGKILL], "Another process of this run has ended; what it said"),
            ({}, [0, 0], "distill: done"),
        ]
    ):
        ended = server.run("command", tmp_path / str(at), arguments=["distill", "-r", str(recipe)], signals=signals)
        assert [one.code for one in ended] == codes, ended
        assert said in ended[0].said and ended[1].said == ""
        assert out.exists() == (not signals) and out.with_name("stopped.partial").exists() == bool(signals)
    assert ended[0].found == ["DistributedDataParallel"]  # from the last state that was saved
    assert content(out) == content(whole[0])
    assert trained(out).curve == trained(whole[0]).curve


def test_a_refusal_ends_all(server: RanksServer, made: Any, tmp_path: Path) -> None:
    recipe, out = made("refused")
    several = "works in one process, and 2 were launched"
    for task, more, code, why in (
        ("distill", ["--layers", "9"], 3, "9 layers cannot be kept of 3"),
        ("quantize", [], 2, several),
    ):
        ended = server.run("command", tmp_path / task, arguments=[task, "-r", str(recipe), *more])
        assert [one.code for one in ended] == [code, code] and why in ended[0].said and ended[1].said == "", ended
    assert not out.exists() and not out.with_name("refused.partial").exists()


@pytest.mark.parametrize(
    ("layout", "tied"),
    [("plain", True), ("accelerate", False), ("accelerate", True), ("alone", False), ("half", False)],
)
def test_shards_have_the_gradients_of_the_whole(server: RanksServer, tmp_path: Path, layout: str, tied: bool) -> None:
    ended = server.run("sharded", tmp_path / "said", layout=layout, tied=tied, out=str(tmp_path / "out"))
    assert [one.code for one in ended] == [0, 0], ended
    assert all(one.found["same"] and one.found["off"] < (0.1 if layout == "half" else 1e-5) for one in ended), ended
    model, info = load(tmp_path / "out")
    assert not info["missing_keys"] and type(model).__name__ == "LlamaForCausalLM"


def test_two_processes_adapt_as_one_does_although_they_are_stopped(
    server: RanksServer, adapting: Any, read_here: None, tmp_path: Path
) -> None:
    recipe, out = adapting("stopped", {"name": "lora", "rank": 4})
    for at, (signals, code, steps) in enumerate((({"1": signal.SIGTERM}, 12, 3), ({}, 0, 3))):
        ended = server.run("command", tmp_path / str(at), arguments=["lora", "-r", str(recipe)], signals=signals)
        assert [one.code for one in ended] == [code, code] and ended[1].said == "", ended
        assert [one.found for one in ended] == [["DistributedDataParallel"] * steps] * 2
    recipe, alone = adapting("alone", {"name": "lora", "rank": 4}, batch=4)
    run.execute(validate(read(str(recipe))), progress=Silent())
    alike(out, alone)


LABEL, MERGE, ANCHOR = {"label": "kind"}, {"merge": True}, {"anchor": 0.5}
KINDS: list[tuple[Any, dict[str, Any]]] = [
    ({"name": "dora", "rank": 4}, {}),
    ({"name": "vera", "rank": 16}, {}),
    ({"name": "ia3"}, {}),
    ({"name": "adapter", "width": 8}, {}),
    ({"name": "lora", "rank": 4}, LABEL),
    ({"name": "lora", "rank": 4}, MERGE),
    ({"name": "lora", "rank": 4}, ANCHOR),
    ({"name": "full"}, {}),
    ({"name": "freeze", "blocks": 1}, {}),
]
WHOLE: list[tuple[Any, dict[str, Any]]] = [  # only as wholes
    ({"name": "adalora", "rank": 2}, {}),
    ({"name": "qlora", "rank": 4}, {}),
    ({"name": "loftq", "rank": 4}, {}),
    ({"name": "prefix", "tokens": 4}, {}),
    ({"name": "p-tuning", "tokens": 4, "width": 16}, {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "stage", "shards"),
    [*((*one, False) for one in (*KINDS, *WHOLE)), *((*one, True) for one in KINDS)],
    ids=lambda value: value.get("name", "-".join(value)) if isinstance(value, dict) else ("shards" * value or "whole"),
)
def test_each_kind_is_learned_together_whole_or_in_shards(
    method: Any, stage: Any, shards: bool, server: RanksServer, adapting: Any, read_here: None, tmp_path: Path
) -> None:
    """Saved states included; a run that was stopped gives the bytes of one that was not."""
    name = "-".join([method["name"], *stage, *["shards"] * shards])
    results = []
    for at, (tag, signals) in enumerate((("whole", {}), ("stopped", {"0": signal.SIGTERM}), ("stopped", {}))):
        recipe, out = adapting(f"{name}-{tag}", method, stage)
        command = {"arguments": ["lora", "-r", str(recipe)], "signals": signals, "shards": shards}
        ended = server.run("command", tmp_path / str(at), **command)
        assert [one.code for one in ended] == [12 if signals else 0] * 2, ended
        assert all(one.startswith("FSDP") == shards for one in ended[1].found) and len(ended[1].found) >= 3
        assert shards or set(ended[1].found) == {"DistributedDataParallel"}
        results.append(out)
    recipe, alone = adapting(f"{name}-alone", method, stage, batch=4)
    run.execute(validate(read(str(recipe))), progress=Silent())
    alike(results[0], alone)
    assert content(results[2]) == content(results[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora", "vera", "adapter", "full", "freeze"])
@pytest.mark.parametrize("layout", ["plain", "accelerate"])
def test_an_adapter_of_shards_has_the_gradients_of_the_whole_and_is_saved_whole(
    server: RanksServer, deep: Path, method: str, layout: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ended = server.run("adapted", tmp_path / "said", model=str(deep), method=method, layout=layout, out=str(out))
    assert [one.code for one in ended] == [0, 0], ended
    assert all(one.found["same"] and one.found["off"] < 1e-4 for one in ended), ended
    saved, plain = tensors(out), tensors(tmp_path / "out-plain")
    assert saved.keys() == plain.keys() and all(torch.equal(value, plain[name]) for name, value in saved.items())
    if method in ("lora", "dora", "vera"):
        read_back = PeftModel.from_pretrained(load(deep)[0], str(out))
        ids = torch.randint(3, 100, (4, 20), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            assert torch.allclose(read_back(input_ids=ids).logits, saved["logits"], atol=1e-5)


@pytest.mark.parametrize("method", ["qlora", "loftq", "prefix", "prompt", "p-tuning", "adalora"])
def test_what_shards_cannot_do_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], deep: Path, method: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(["lora", str(deep), "--method", method, "--data", "generator", "--plan"]) == 3
    assert "FSDP was asked for, and " in (said := capsys.readouterr().err)
    assert "Launch without --use_fsdp, or take --method lora." in said
    assert main(["lora", str(deep), "--data", "generator", "--max-steps", "1", "--plan"]) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_accelerate_shards_on_gpus(made: Any, adapting: Any, tmp_path: Path) -> None:
    """One process has one shard; the way through accelerate and Trainer, saved states included, is the same."""
    env = environment()
    for name, launcher in (("shards", SHARDED), ("one", [sys.executable])):
        recipe, _ = made(name, save_minutes=1e-6)
        command = [*launcher, str(CASES), str(tmp_path / name), "distill", "-r", str(recipe)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
        assert done.returncode == 0, done.stderr
    assert set(json.loads((tmp_path / "shards").read_text())) == {"FSDPLlamaForCausalLM"}
    found, right = (trained(recipe.with_name(name)) for name in ("shards", "one"))
    assert found.held_after == pytest.approx(right.held_after, rel=0.05)
    model, info = load(recipe.with_name("shards"))
    assert not info["missing_keys"] and type(model).__name__ == "LlamaForCausalLM"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("method", "stage"), [({"name": "lora"}, {}), ({"name": "lora"}, LABEL), ({"name": "full"}, {})]
)
def test_accelerate_shards_what_is_adapted_on_gpus(adapting: Any, method: Any, stage: Any, tmp_path: Path) -> None:
    """The same of adapters and of whole models that learn a text."""
    found = {}
    for name, launcher in (("shards", SHARDED), ("one", [sys.executable])):
        recipe, out = adapting(f"gpu-{method['name']}-{'-'.join(stage)}-{name}", method, stage)
        seen = tmp_path / name
        command = [*launcher, str(CASES), str(seen), "lora", "-r", str(recipe)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=600)
        assert done.returncode == 0, done.stderr
        found[name] = trained(out), set(json.loads(seen.read_text()))
    assert all(one.startswith("FSDP") for one in found["shards"][1]) and found["shards"][1]
    assert found["shards"][0].held_after == pytest.approx(found["one"][0].held_after, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [["accelerate", "launch", "--multi_gpu", "--num_processes", "2"], TORCHRUN])
def test_launchers(made: Any, launcher: list[str]) -> None:
    """As people type it; a signal to the launcher reaches all."""
    recipe, out = made(launcher[0].replace("/", "-"), max_steps=60)
    command = [*launcher, "-m", "llmshrink", "distill", "-v", "-r", str(recipe)]
    env = environment()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stderr and any("step 5 of 60" in line for line in process.stderr)
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
        assert process.wait(60) != 0
    assert "The same command goes on from what was finished." in said and not out.exists()
    again = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert again.returncode == 0, again.stderr
    assert again.stdout.endswith(f"{out}\n") and "step 5 of 60" not in again.stderr
    assert trained(out).steps == 60 and trained(out).processes == 2


def test_what_accelerate_does_not_start_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], deep: Path
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert main(["distill", str(deep), "--layers", "2"]) == 2
    assert "several processes were asked for, and one was started" in capsys.readouterr().err
