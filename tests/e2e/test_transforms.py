"""Runs that rewrite weights first: the function stays, a stopped run goes on, what cannot be done is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SMALL, content, recipe
from tiny import build_model, config

from llmshrink import run
from llmshrink.engine import transform
from llmshrink.engine.workspace import WORK
from llmshrink.errors import InterruptedRun, LlmshrinkError, PlanError, RecipeError
from llmshrink.io import safetensors
from llmshrink.model import families
from llmshrink.model.flow import Flow
from llmshrink.progress import Silent
from llmshrink.recipe.schema import Recipe
from llmshrink.report.rows import stage_lines
from llmshrink.report.schema import Report

pytestmark = pytest.mark.usefixtures("without_reader")
RTN = {"name": "rtn", "bits": 4, "group_size": 32}
GPTQ = {"name": "gptq", "bits": 4, "group_size": 32}
ALL: list[Any] = ["hadamard", "awq", "smoothquant"]

Wanted = Callable[..., Recipe]


@pytest.fixture
def wanted(smallest: Path, text_file: Path, tmp_path: Path) -> Wanted:
    """Recipes of a run that takes a second."""

    def make(transform: Any, model: Path = smallest, method: dict[str, Any] = RTN, **more: Any) -> Recipe:
        stage = {"format": {"name": "dense"}, **more.pop("stage", {}), "transform": transform}
        sections = {**SMALL, "calibration": {"samples": 12, "length": 16}, "stage": stage, **more}
        return recipe(model, tmp_path / "out", text_file, method, **sections)

    return make


def done(wanted: Recipe) -> Report:
    return run.execute(wanted, progress=Silent())


class _Interrupting(Silent):
    """Sends this process a signal when a block is done."""

    def advance(self, amount: int, note: str = "") -> None:
        if note.startswith("block 0"):
            os.kill(os.getpid(), signal.SIGTERM)


def test_the_report_says_what_was_done(wanted: Wanted, other_text: Path) -> None:
    scored = {"evaluation": {"data": [str(other_text)], "rows": 4, "length": 16, "speed": False}}
    wish = wanted(["hadamard", {"name": "awq", "steps": 4}], **scored)
    assert run.make_plan(wish).transforms == "hadamard (states and values), awq"
    report = done(wish)
    stage = report.stages[0]
    assert [(t.block, t.name) for t in stage.transforms] == [(b, n) for b in (0, 1) for n in ("hadamard", "awq")]
    assert all(t.difference < 1e-5 for t in stage.transforms)
    for found in stage.transforms:
        assert (found.error_left is None) == (found.name == "hadamard")
        assert found.error_left is None or found.error_left <= 1
    assert any("weights rewritten first: hadamard, awq (leaves 0." in line for line in stage_lines(stage))
    assert stage.memory.measured_bytes is not None and "transform" in stage.seconds
    # What is compared with is the original as it is on disk.
    assert report.before is not None and report.before.scores[0].kl is None
    shutil.rmtree(str(report.output))
    plain = done(wanted([], **scored))
    assert plain.before is not None and plain.before.scores[0].perplexity == report.before.scores[0].perplexity


@pytest.mark.parametrize("transform", [["hadamard"], ["awq"], ["smoothquant"], ALL], ids=str)
def test_with_many_bits_the_result_is_the_original(wanted: Wanted, other_text: Path, transform: Any) -> None:
    """8 bits hardly change anything: so neither does what was written, with every tensor that was changed."""
    scored = {"evaluation": {"data": [str(other_text)], "rows": 4, "length": 16, "speed": False}}
    report = done(wanted(transform, method={"name": "rtn", "bits": 8, "group_size": 16}, **scored))
    assert report.after is not None and report.after.scores[0].kl is not None
    assert report.after.scores[0].kl < 2e-3
    assert report.output is not None
    written, source = (safetensors.Checkpoint.open(Path(p)) for p in (report.output, report.recipe["model"]["id"]))
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(written.get(norm), source.get(norm))


@pytest.mark.parametrize("transform", [["hadamard"], ["awq"], ALL], ids=str)
@pytest.mark.parametrize("method", [RTN, GPTQ], ids=["rtn", "gptq"])
def test_a_stopped_run_gives_the_same_bytes(wanted: Wanted, transform: Any, method: dict[str, Any]) -> None:
    wish = wanted(transform, method=method)
    report = done(wish)
    assert wish.output is not None
    whole = content(Path(wish.output))
    shutil.rmtree(wish.output)
    with pytest.raises(InterruptedRun):
        run.execute(wish, progress=_Interrupting())
    again = done(wish)
    assert again.stages[0].resumed_blocks == 1 and content(Path(wish.output)) == whole
    assert again.stages[0].transforms == report.stages[0].transforms


def test_a_block_whose_scales_are_damaged_is_done_again(wanted: Wanted) -> None:
    wish = wanted(["awq"])
    done(wish)
    assert wish.output is not None
    whole = content(Path(wish.output))
    shutil.rmtree(wish.output)
    with pytest.raises(InterruptedRun):
        run.execute(wish, progress=_Interrupting())
    (scales,) = (Path(wish.output + ".partial") / WORK).glob("scales-00000-*")
    scales.write_bytes(scales.read_bytes()[:-1] + b"x")
    again = done(wish)
    assert again.stages[0].resumed_blocks == 0 and content(Path(wish.output)) == whole
    assert [event.kind for event in again.events if "scales" in event.message] == ["work_lost"]


def test_other_settings_are_another_run(wanted: Wanted) -> None:
    with pytest.raises(InterruptedRun):
        run.execute(wanted(["awq"]), progress=_Interrupting())
    with pytest.raises(LlmshrinkError, match=r"transform\.0\.steps: 10 -> 3"):
        done(wanted([{"name": "awq", "steps": 3}]))


@pytest.mark.parametrize("family", ["qwen3-moe", "gemma2", "phi3", "gpt2", "opt", "falcon-new", "bloom"])
def test_families(wanted: Wanted, models_folder: Callable[..., Path], family: str) -> None:
    """Half-precision models too: norms and what else is written dense are rounded once more."""
    report = done(wanted(ALL, models_folder(family, torch.bfloat16)))
    assert all(check.passed for check in report.stages[0].checks)
    assert {found.name for found in report.stages[0].transforms} == set(ALL)
    told = [event for event in report.events if event.kind == "not_turned"]
    assert len(told) == (family not in ("qwen3-moe", "phi3"))


@pytest.mark.parametrize(("family", "transform"), [("llama", ["hadamard"]), ("gemma2", ["hadamard", "awq"])])
def test_gguf(wanted: Wanted, tmp_path: Path, family: str, transform: Any) -> None:
    """Embedding and head are compressed there, and a Gemma norm is stored with its 1."""
    build_model(tmp_path / "model", config(family, query_pre_attn_scalar=16), torch.bfloat16)
    report = done(wanted(transform, tmp_path / "model", None, stage={"format": {"type": "Q8_0"}}))
    assert all(check.passed for check in report.stages[0].checks)
    assert report.stages[0].type == "Q8_0"


@pytest.mark.parametrize("format_", [{"name": "dense"}, {"type": "Q8_0"}], ids=["dense", "gguf"])
def test_a_tied_head_gets_a_tensor_of_its_own(
    wanted: Wanted, models_folder: Callable[..., Path], other_text: Path, format_: Any
) -> None:
    folder = models_folder("llama-tied", torch.bfloat16)
    method = {"name": "rtn", "bits": 8, "group_size": 16} if "name" in format_ else None
    scored = {"evaluation": {"data": [str(other_text)], "rows": 4, "length": 16, "speed": False}}
    untied = [{"name": "hadamard", "allow_untie": True}]
    plan, told = (run.make_plan(wanted(t, folder, method, stage={"format": format_})) for t in (untied, ["hadamard"]))
    assert plan.bytes_after > told.bytes_after and plan.bytes_before == told.bytes_before
    assert [e.kind for e in plan.events if "head" in e.message] == ["untied"]
    assert [e.kind for e in told.events if "head" in e.message] == ["not_turned"]
    report = done(wanted(untied, folder, method, stage={"format": format_}, **scored))
    assert all(check.passed for check in report.stages[0].checks)
    assert report.stages[0].bytes_after == report.stages[0].planned_bytes_after
    assert report.after is not None and report.after.scores[0].kl is not None and report.after.scores[0].kl < 5e-3
    settings = json.loads((Path(str(report.output)) / "config.json").read_bytes())
    assert settings["tie_word_embeddings"] is False


def test_static_inputs(wanted: Wanted) -> None:
    inputs = {"inputs": {"type": "int8", "scales": "static"}, "format": {"name": "compressed-tensors"}}
    method = {"name": "rtn", "bits": 8, "group_size": -1}
    assert done(wanted(["smoothquant"], method=method, stage=inputs)).stages[0].transforms


def test_a_model_that_is_compressed_already(wanted: Wanted, tmp_path: Path) -> None:
    """What its codes mean is rewritten; what is left out is written dense, and rewritten too."""
    first = done(wanted([], method={"name": "rtn", "bits": 8}, stage={"format": {"name": "compressed-tensors"}}))
    packed = Path(str(first.output)).rename(tmp_path / "packed")
    report = done(wanted(ALL, packed, method=RTN, stage={"ignore": [".*k_proj", ".*down_proj"]}))
    assert all(check.passed for check in report.stages[0].checks)
    assert all(found.difference < 1e-5 for found in report.stages[0].transforms)


def test_smoke(wanted: Wanted) -> None:
    assert all(check.passed for check in run.smoke(wanted(ALL), progress=Silent()))


def test_statistics_in_several_passes_give_the_same_scales(wanted: Wanted, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = done(wanted(["awq"]))
    shutil.rmtree(str(whole.output))
    monkeypatch.setattr(transform, "passes", lambda sizes, _: [slice(i, i + 1) for i in range(len(sizes))])
    apart = done(wanted(["awq"]))
    assert apart.stages[0].transforms == whole.stages[0].transforms


def test_a_learned_block(wanted: Wanted) -> None:
    stage = {"format": {"name": "dense"}, "reconstruct": {"steps": 10, "tokens": 32}}
    method = {"name": "rtn", "bits": 2, "group_size": 32}
    (first, *_) = done(wanted(["hadamard"], method=method, stage=stage)).stages[0].blocks
    assert first.error_after < first.error_before


@pytest.mark.parametrize("transform", ["awq", "smoothquant"])
def test_every_link_sees_its_inputs(wanted: Wanted, models_folder: Callable[..., Path], transform: str) -> None:
    """Of GPT-2 too, where a norm's link comes before that of values, which a block computes earlier."""
    report = done(wanted([transform], models_folder("gpt2")))
    written, source = (safetensors.Checkpoint.open(Path(str(p))) for p in (report.output, report.recipe["model"]["id"]))
    for norm in ("ln_1", "ln_2"):
        name = f"transformer.h.0.{norm}.weight"
        assert not torch.equal(written.get(name), source.get(name)), norm


# --- the proof


def test_what_a_family_is_said_to_be_is_proved(
    wanted: Wanted, models_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router that nobody named reads what a norm gives: no structure says so, but the block then does otherwise."""
    family = families._LLAMA
    readers = tuple(name for name in family.norms["post_attention_layernorm"] if name != "mlp.gate")
    wrong = replace(family, norms={**family.norms, "post_attention_layernorm": readers})
    monkeypatch.setitem(families.FAMILIES, "qwen3_moe", wrong)
    wish = wanted(["smoothquant"], models_folder("qwen3-moe"))
    with pytest.raises(LlmshrinkError, match=r"after smoothquant block 0 does not do what it did: .* differs by"):
        done(wish)
    assert wish.output is not None and not Path(wish.output).exists()


@pytest.mark.parametrize("scaled", ["embedding", "head"])
def test_the_ends_are_proved_too(wanted: Wanted, monkeypatch: pytest.MonkeyPatch, scaled: str) -> None:
    turned = Flow.turned

    def forgetful(self: Flow, *arguments: Any) -> Any:
        assert self.final is not None and self.embedding is not None
        key = self.embedding.key if scaled == "embedding" else self.final.consumers[0].key
        return [edit for edit in turned(self, *arguments) if edit.place.key != key]

    monkeypatch.setattr(Flow, "turned", forgetful)
    with pytest.raises(LlmshrinkError, match=f"after hadamard the {scaled} does not do what it did"):
        done(wanted(["hadamard"]))


# --- refused before any compute


@pytest.mark.parametrize(
    ("family", "transform", "why"),
    [
        ("bert", ["awq"], "No flow is known for model_type 'bert'"),
        ("llama", ["awq", "hadamard"], "hadamard turns the whole model, and awq looks at its blocks: put hadamard"),
        ("gemma2", [{"name": "hadamard", "residual": True}], "gemma2 cannot be turned: norms behind its layers"),
        ("gpt2", [{"name": "hadamard", "residual": True}], "its norms subtract the mean"),
        ("llama-tied", [{"name": "hadamard", "residual": True}], "its head is tied to the embedding"),
        ("gpt2", [{"name": "hadamard", "heads": False}], "hadamard: nothing is left to turn"),
        ("olmo2", ["smoothquant"], "smoothquant: olmo2 has no place for it that feeds a compressed layer"),
    ],
)
def test_refusals(wanted: Wanted, models_folder: Callable[..., Path], family: str, transform: Any, why: str) -> None:
    with pytest.raises(PlanError, match=why):
        run.make_plan(wanted(transform, models_folder(family)))


def test_models_that_were_trained_to_be_ternary_are_not_changed(wanted: Wanted) -> None:
    with pytest.raises(PlanError, match="ternary stores what a model was trained to be, and awq would change that"):
        run.make_plan(wanted("awq", method={"name": "ternary", "group_size": 32}))


def test_what_is_left_as_it_is_gets_no_scales(wanted: Wanted) -> None:
    kept = [rf".*\.{name}_proj" for name in ("q", "k", "v", "gate", "up")]
    with pytest.raises(PlanError, match="smoothquant: llama has no place for it"):
        run.make_plan(wanted("smoothquant", stage={"ignore": kept}))


def test_names_and_mappings(wanted: Wanted) -> None:
    one = wanted("awq").stages[0].model_dump(mode="json")["transform"]
    assert one == wanted({"name": "awq"}).stages[0].model_dump(mode="json")["transform"] == [{"name": "awq"}]
    assert not wanted(None).stages[0].model_dump()["transform"]
    for wrong, message in (
        ("awk", "there is no transform 'awk'; did you mean 'awq'"),
        ({"name": "awq", "step": 3}, "did you mean 'steps'"),
        (["awq", "awq"], "'awq' is there already"),
    ):
        with pytest.raises(RecipeError) as caught:
            wanted(wrong)
        assert message in caught.value.problems[0]


def test_a_bfloat16_norm_is_divided_without_an_error(wanted: Wanted, tmp_path: Path) -> None:
    """The scale next to the one found is taken, by which the rounded norm was really divided."""
    build_model(tmp_path / "model", config("llama"), torch.bfloat16)
    report = done(wanted(["awq"], tmp_path / "model"))
    assert all(found.difference < 1e-5 for found in report.stages[0].transforms)


def test_tokens_that_go_to_other_experts_are_told_and_do_not_end_the_run(wanted: Wanted, tmp_path: Path) -> None:
    """A router is written in bfloat16 and rounded anew: one choice in some hundreds was that close."""
    model = tmp_path / "mixtral"
    build_model(model, config("mixtral", num_local_experts=8, num_hidden_layers=6), torch.bfloat16)
    report = done(wanted(["hadamard"], model))
    told = [event for event in report.events if event.kind == "rerouted"]
    assert told and all("go to other experts" in event.message for event in told)
    assert max(found.difference for found in report.stages[0].transforms) < 0.02
