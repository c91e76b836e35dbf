"""GGUF from a recipe to a folder that a foreign reader takes: every family, every step, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from gguf_files import CHANGES, FAMILIES
from helpers import Stopping, content, recipe
from safetensors.torch import load_file, save_file
from tiny import build_model, config
from transformers import AutoConfig, AutoModelForCausalLM

from llmshrink import run
from llmshrink.checks.written import OUTPUT_TOLERANCE, probe_tokens, streamed_output
from llmshrink.errors import InterruptedRun, PlanError
from llmshrink.gguf.checkpoint import SINGLE
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.progress import Silent
from llmshrink.report.schema import Check, Report

CPU = torch.device("cpu")
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function family -> folder of a tiny model that llama.cpp would run."""
    root = tmp_path_factory.mktemp("models")

    def folder(family: str) -> Path:
        path = root / family
        if not path.exists():
            wide = WIDE if family == "wide" else {}
            build_model(path, config("llama" if wide else family, **CHANGES.get(family, {}), **wide), torch.bfloat16)
        return path

    return folder


def made(source: Path, out: Path, text: Path, mix: str | None = "Q4_K_M", method: str = "rtn", **more: Any) -> Report:
    """The report of writing GGUF."""
    stage = {"format": {"name": "gguf", "type": mix}, **more.pop("stage", {})}
    return run.execute(recipe(source, out, text, {"name": method}, stage=stage, **more), progress=Silent())


def types(report: Report) -> dict[str, str | None]:
    return {layer.name: layer.type for layer in report.stages[0].layers}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_back_by_transformers(
    tiny: Callable[..., Path], text_file: Path, tmp_path: Path, family: str
) -> None:
    report = made(tiny(family), tmp_path / "out", text_file)
    stage = report.stages[0]
    checks = {check.name: check.passed for check in stage.checks}
    assert checks.pop("reader") is (None if family == "mistral" else True)
    assert checks == dict.fromkeys(("sizes", "hashes", "decode", "copied", "blocks"), True)
    assert stage.planned_bytes_after == stage.bytes_after
    assert all(layer.type is not None for layer in stage.layers), "no matrix is left in floats"
    if family == "mistral":
        assert any("transformers cannot load it" in event.message for event in report.events)
        return
    # The negative control: one scale of one block that is changed must show.
    written = StreamedModel(open_source(str(tmp_path / "out")), CPU)
    ours = streamed_output(written, probe_tokens(written))
    spoil(tmp_path / "out" / SINGLE)
    known = AutoConfig.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=SINGLE, config=known, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(probe_tokens(written)).logits
    assert (ours - theirs).abs().max() > 10 * OUTPUT_TOLERANCE * ours.std()
    assert not all(check.passed for check in run.verify(tmp_path / "out", progress=Silent()))


def spoil(path: Path) -> None:
    """Another scale in the first block of the first matrix."""
    offset = next(int(t.data_offset) for t in GGUFReader(path).tensors if t.name == "blk.0.ffn_down.weight")
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(np.float16(1).tobytes())


def test_a_foreign_reader_decodes_what_the_method_claimed(
    tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    report = made(tiny("wide"), tmp_path / "out", text_file, method="gptq")
    assert set(types(report).values()) >= {"Q4_K", "Q6_K"}
    written = StreamedModel(open_source(str(tmp_path / "out")), CPU)
    file = GGUFReader(tmp_path / "out" / SINGLE)
    foreign = {t.name: dequantize(t.data, t.tensor_type) for t in file.tensors}
    names = {"mlp.down_proj": "ffn_down", "mlp.up_proj": "ffn_up", "self_attn.v_proj": "attn_v"}
    for index in range(2):
        for ours, theirs in names.items():
            decoded = written.weights.get(f"model.layers.{index}.{ours}.weight")
            assert np.array_equal(foreign[f"blk.{index}.{theirs}.weight"], decoded.numpy())
    assert np.array_equal(foreign["token_embd.weight"], written.weights.get("model.embed_tokens.weight").numpy())
    assert np.array_equal(foreign["output.weight"], written.weights.get("lm_head.weight").numpy())


def test_the_head_is_compressed_for_its_own_inputs(tiny: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    reports = [made(tiny("wide"), tmp_path / method, text_file, "Q2_K", method).stages[0] for method in ("gptq", "rtn")]
    heads = [next(layer for layer in stage.layers if layer.name == "lm_head") for stage in reports]
    assert [head.method for head in heads] == ["gptq", "rtn"]
    assert heads[0].objective is not None and heads[0].objective < 1
    tables = [next(layer for layer in stage.layers if layer.name == "model.embed_tokens") for stage in reports]
    assert [table.method for table in tables] == ["rtn", "rtn"], "rows that are looked up have no inputs"


@pytest.mark.parametrize("after", [1, pytest.param(2, marks=SLOW), 3, pytest.param(4, marks=SLOW)])
def test_a_stopped_run_gives_the_same_bytes(
    tiny: Callable[..., Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """After the embedding, after each block, after the head."""
    monkeypatch.setattr("llmshrink.job.check_reader", lambda *_: Check(name="reader", passed=True, detail="left out"))
    made(tiny("wide"), tmp_path / "whole", text_file, method="gptq")
    wanted = recipe(
        tiny("wide"),
        tmp_path / "out",
        text_file,
        {"name": "gptq"},
        stage={"format": {"name": "gguf", "type": "Q4_K_M"}},
    )
    with pytest.raises(InterruptedRun):
        run.execute(wanted, progress=Stopping(after, step="compress"))
    report = run.execute(wanted, progress=Silent())
    assert report.stages[0].resumed_blocks == min(max(after - 1, 0), 2)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_layer_may_have_a_type_of_its_own(tiny: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    layers = {".*down_proj": {"type": "Q8_0"}, ".*layers.0.*q_proj": {"name": "cast"}, "lm_head": None}
    found = types(made(tiny("wide"), tmp_path / "out", text_file, stage={"layers": layers}))
    assert {kind for name, kind in found.items() if name.endswith("down_proj")} == {"Q8_0"}
    assert found["model.layers.0.self_attn.q_proj"] == "F16" and found["lm_head"] is None


@pytest.mark.parametrize("mix", ["F16", "BF16", "Q8_0", "Q2_K", "TQ2_0"])
def test_other_mixes_are_written_and_read(
    tiny: Callable[..., Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mix: str
) -> None:
    monkeypatch.setattr("llmshrink.job.check_reader", lambda *_: Check(name="reader", passed=True, detail="left out"))
    report = made(tiny("wide"), tmp_path / "out", text_file, mix)
    assert all(check.passed for check in report.stages[0].checks)
    assert types(report)["model.layers.0.self_attn.q_proj"] == mix
    assert report.stages[0].type == mix


def test_bits_choose_the_mix(tiny: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    method = {"name": "rtn", "bits": 3}
    plan = run.make_plan(recipe(tiny("wide"), tmp_path / "out", text_file, method, stage={"format": {"name": "gguf"}}))
    assert plan.type == "Q3_K_M"
    assert {layer.type for layer in plan.layers} == {"Q3_K", "Q4_K", "Q5_K", "Q6_K"}


@pytest.mark.parametrize(
    ("family", "method", "mix", "says"),
    [
        ("opt", {"name": "rtn"}, "Q4_K_M", "model types gemma2"),
        ("wide", {"name": "rtn", "group_size": 32}, "Q4_K_M", "group_size cannot be chosen beside it"),
        ("wide", {"name": "rtn", "bits": 4}, "Q4_K_M", "bits cannot be chosen beside it"),
        ("wide", {"name": "rtn", "type": "Q4_0"}, "Q4_K_M", "type cannot be chosen beside it"),
        ("wide", {"name": "nf4"}, "Q4_K_M", "it stores the types Q4_0"),
    ],
)
def test_what_cannot_be_is_refused_before_compute(
    tiny: Callable[..., Path],
    models_folder: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    family: str,
    method: dict[str, Any],
    mix: str,
    says: str,
) -> None:
    source = tiny(family) if family == "wide" else models_folder(family)
    wanted = recipe(source, tmp_path / "out", text_file, method, stage={"format": {"name": "gguf", "type": mix}})
    with pytest.raises(PlanError, match=says):
        run.make_plan(wanted)


def test_a_written_file_can_be_measured_and_exported(
    tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    """A folder with a GGUF file is a model like any other."""
    made(tiny("wide"), tmp_path / "out", text_file, "Q8_0")
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "out", moved)
    assert "quantization_config" not in json.loads((moved / "config.json").read_bytes())
    exported = recipe(moved, tmp_path / "dense", text_file)
    stage = {"task": "export", "format": {"name": "dense"}}
    data = json.loads(exported.model_dump_json(exclude_unset=True)) | {"stages": [stage]}
    report = run.execute(exported.model_validate(data), progress=Silent())
    assert all(check.passed for check in report.stages[0].checks)
    before, after = (StreamedModel(open_source(str(folder)), CPU) for folder in (moved, tmp_path / "dense"))
    key = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(before.weights.get(key).bfloat16(), after.weights.get(key))


def test_norms_that_are_stored_plus_one_come_back(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma's: what is read is the sum less one, which need not be the weight that was written."""
    monkeypatch.setattr("llmshrink.job.check_reader", lambda *_: Check(name="reader", passed=True, detail="left out"))
    build_model(tmp_path / "source", config("gemma2", **CHANGES["gemma2"]), torch.float32)
    path = tmp_path / "source" / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(3)
    norms = {name: torch.randn(t.shape, generator=generator) * 0.01 for name, t in tensors.items() if t.ndim == 1}
    save_file({**tensors, **norms}, path, {"format": "pt"})
    checks = made(tmp_path / "source", tmp_path / "out", text_file, "Q8_0").stages[0].checks
    assert all(check.passed for check in checks)


def test_a_copy_of_the_tied_embedding_is_left_out(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmshrink.job.check_reader", lambda *_: Check(name="reader", passed=True, detail="left out"))
    build_model(tmp_path / "source", config("llama-tied"), torch.bfloat16)
    path = tmp_path / "source" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    report = made(tmp_path / "source", tmp_path / "out", text_file, "Q8_0")
    assert all(check.passed for check in report.stages[0].checks)
    assert "lm_head" not in types(report)


def test_rows_are_read_by_themselves(tiny: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    made(tiny("wide"), tmp_path / "out", text_file)
    weights = StreamedModel(open_source(str(tmp_path / "out")), CPU).weights
    whole, rows = weights.get("lm_head.weight"), weights.rows("lm_head.weight")
    assert torch.equal(rows(slice(30, 50)), whole[30:50])
    assert torch.equal(rows(torch.tensor([7, 7, 150])), whole[[7, 7, 150]])


def test_a_narrow_matrix_is_told(tiny: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    stage = {"format": {"name": "gguf", "type": "q4_k_m"}}
    plan = run.make_plan(recipe(tiny("llama"), tmp_path / "out", text_file, {"name": "rtn"}, stage=stage))
    assert plan.type == "Q4_K_M"
    assert any("Q5_0 in place of Q4_K" in event.message for event in plan.events)
