"""Models with rounded inputs, through every step: what transformers gives out for the folder is what we say it does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import content, recipe
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmshrink import run
from llmshrink.checks import written
from llmshrink.checks.written import output_as_read, streamed_output
from llmshrink.engine.compress import Compressor
from llmshrink.errors import GateError, PlanError
from llmshrink.evaluate.reader import Found, ReadRequest, ReadResult, read
from llmshrink.model.anatomy import Part
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.progress import Silent
from llmshrink.report.schema import Report

Models = Callable[..., Path]
CPU = torch.device("cpu")
RTN = {"name": "rtn", "bits": 8}
STATIC = {"type": "int8", "scales": "static"}
IDS = torch.randint(0, 160, (3, 32), generator=torch.Generator().manual_seed(11))
CASES: list[tuple[str, Any, dict[str, Any] | None]] = [
    ("llama", "int8", RTN),
    ("llama", STATIC, RTN),
    ("llama", "fp8", {"name": "fp8"}),
    ("llama", {"type": "fp8", "scales": "static"}, {"name": "fp8", "scale_per": "tensor"}),
    ("llama", None, {"name": "fp8"}),
    ("gemma2", "int8", {"name": "gptq", "bits": 8}),
    ("opt", "int8", RTN),  # hands some linears [tokens, in]
    ("falcon", "fp8", {"name": "fp8"}),  # decompressed while it is loaded, and no inputs rounded then
    ("qwen3-moe", "fp8", {"name": "fp8"}),  # experts are
]


def quantized(source: Path, out: Path, text: Path, inputs: Any, method: dict[str, Any] | None, **more: Any) -> Report:
    return run.execute(recipe(source, out, text, method, stage={"inputs": inputs, **more}), progress=Silent())


def opened(folder: Path) -> StreamedModel:
    return StreamedModel(open_source(str(folder)), CPU)


def theirs(folder: Path, *, rounded: bool = True) -> Tensor:
    """What transformers gives out, in this process."""
    found = read(ReadRequest(folder=str(folder), tokens=IDS.tolist(), dtype="float32", round_inputs=rounded))
    assert found.output is not None
    return found.output


def spoil(folder: Path, ending: str, change: Callable[[Tensor], Tensor]) -> None:
    """Change one tensor of the first block."""
    path = folder / "model-00001-of-00003.safetensors"
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if name.endswith(ending))
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def flip(codes: Tensor) -> Tensor:
    flat = codes.view(torch.uint8).clone()
    flat[0, 0] ^= 0b110000
    return flat.view(codes.dtype)


@pytest.mark.parametrize(("family", "inputs", "method"), CASES)
def test_the_reader_gives_out_what_we_say(
    models_folder: Models, text_file: Path, tmp_path: Path, family: str, inputs: Any, method: dict[str, Any]
) -> None:
    source, out = models_folder(family, torch.bfloat16), tmp_path / "out"
    stage = quantized(source, out, text_file, inputs, method).stages[0]
    assert {c.name: c.passed for c in stage.checks}["reader"] and stage.planned_bytes_after == stage.bytes_after
    model = opened(out)
    assert model.weights.rounds_inputs == (inputs is not None)
    ours, plain = output_as_read(model, IDS), output_as_read(model, IDS, rounded=False)
    spread = float(ours.std())
    assert spread > 0.5 and (theirs(out) - ours).abs().max() <= 1e-4 * spread
    assert (theirs(out, rounded=False) - plain).abs().max() <= 1e-4 * spread
    rounds = inputs is not None and family != "falcon"
    assert ((ours - plain).abs().max() > 1e-2 * spread) == rounds, "rounding must show, or nothing was compared"
    spoil(out, "proj.weight" if family != "falcon" else "dense.weight", flip)
    assert (theirs(out) - ours).abs().max() > 1e-3 * spread


def test_another_static_scale_shows(models_folder: Models, text_file: Path, tmp_path: Path) -> None:
    quantized(models_folder("llama", torch.bfloat16), tmp_path / "out", text_file, STATIC, RTN)
    before = output_as_read(opened(tmp_path / "out"), IDS)
    spoil(tmp_path / "out", "q_proj.input_scale", lambda scale: scale * 1.5)
    after = output_as_read(opened(tmp_path / "out"), IDS)
    assert (after - before).abs().max() > 1e-2 * before.std()
    assert (theirs(tmp_path / "out") - after).abs().max() <= 1e-4 * before.std()


def test_what_is_measured_rounds_inputs(models_folder: Models, text_file: Path, tmp_path: Path) -> None:
    source = models_folder("llama", torch.bfloat16)
    scored = {"data": [str(text_file)], "rows": 4, "length": 32}
    kl = {}
    for name, inputs in {"codes": None, "codes and inputs": "int8"}.items():
        stage = {"inputs": inputs}
        made = recipe(source, tmp_path / name, text_file, {**RTN, "group_size": -1}, stage=stage, evaluation=scored)
        report = run.execute(made, progress=Silent())
        assert report.after is not None
        kl[name] = report.after.scores[0].kl or 0.0
    assert kl["codes and inputs"] > 1.2 * kl["codes"] > 0


def test_parts_of_a_group_share_their_scale(models_folder: Models, text_file: Path, tmp_path: Path) -> None:
    """vLLM joins q, k and v: they must have one scale."""
    quantized(models_folder("llama", torch.bfloat16), tmp_path / "out", text_file, STATIC, RTN)
    weights = opened(tmp_path / "out").weights
    scales = [weights.input(f"model.layers.0.self_attn.{part}_proj.weight") for part in "qkv"]
    assert all(s is not None and s.scale is not None and s.scale.dtype == torch.bfloat16 for s in scales)
    assert len({float(s.scale) for s in scales if s is not None and s.scale is not None}) == 1


def test_layers_may_differ(models_folder: Models, text_file: Path, tmp_path: Path) -> None:
    down: dict[str, Any] = {"inputs": None, "bits": 4, "group_size": 32}
    layers = {".*down_proj": down}
    stage = quantized(
        models_folder("llama", torch.bfloat16), tmp_path / "out", text_file, "int8", RTN, layers=layers
    ).stages[0]
    assert {c.name: c.passed for c in stage.checks}["reader"]
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    groups = {group["format"]: group for group in config["config_groups"].values()}
    assert set(groups) == {"pack-quantized", "int-quantized"}
    assert all("down_proj" in target for target in groups["pack-quantized"]["targets"])


@pytest.mark.parametrize("inputs", ["int8", STATIC, "fp8"])
def test_a_stopped_run_gives_the_same_bytes(
    models_folder: Models, text_file: Path, tmp_path: Path, inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = models_folder("llama", torch.bfloat16)
    quantized(source, tmp_path / "whole", text_file, inputs, None)
    write = Compressor._outside

    def stop(self: Compressor, part: Part) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Compressor, "_outside", stop)
    with pytest.raises(KeyboardInterrupt):
        quantized(source, tmp_path / "out", text_file, inputs, None)
    monkeypatch.setattr(Compressor, "_outside", write)
    journal = next((tmp_path / "out.partial").rglob("journal*"))
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-1]))  # as if the last block had not been finished
    report = quantized(source, tmp_path / "out", text_file, inputs, None)
    assert report.stages[0].resumed_blocks == 1
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_export_keeps_rounded_inputs_where_the_format_can(
    models_folder: Models, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantized(models_folder("llama", torch.bfloat16), out, text_file, STATIC, RTN)
    output = streamed_output(opened(out), IDS)
    for name in ("compressed-tensors", "dense"):
        wanted = recipe(out, tmp_path / name, text_file)
        wanted = wanted.model_validate(
            {**wanted.model_dump(), "stages": [{"task": "export", "format": {"name": name}}]}
        )
        events = {event.kind for event in run.execute(wanted, progress=Silent()).events}
        again = streamed_output(opened(tmp_path / name), IDS)
        assert torch.equal(again, output) == (name == "compressed-tensors") == ("exact_inputs" not in events)


def test_a_model_with_rounded_inputs_can_be_compressed_again(
    models_folder: Models, text_file: Path, tmp_path: Path
) -> None:
    quantized(models_folder("llama", torch.bfloat16), tmp_path / "first", text_file, "int8", RTN)
    report = quantized(tmp_path / "first", tmp_path / "second", text_file, None, {"name": "gptq", "bits": 8})
    assert not opened(tmp_path / "second").weights.rounds_inputs and report.stages[0].checks[-1].passed


@pytest.mark.parametrize(
    ("family", "inputs", "method", "more", "words"),
    [
        ("llama", "int8", {"name": "rtn", "bits": 4, "group_size": 32}, {}, "symmetric 8-bit codes of their own kind"),
        ("llama", "int8", {"bits": 4}, {}, "symmetric 8-bit codes of their own kind"),
        ("llama", "fp8", {"bits": 4}, {}, "Inputs fp8 go with method fp8"),
        ("llama", "fp8", RTN, {}, "inputs fp8 with method fp8"),
        ("llama", "int8", RTN, {"format": {"name": "gptq"}}, "it cannot say that inputs are rounded"),
        ("llama", "int8", RTN, {"format": {"name": "dense"}}, "compressed-tensors can"),
        ("gpt2", "int8", RTN, {}, "Conv1D"),
        ("falcon", STATIC, RTN, {}, "no place for static scales"),
        ("qwen3-moe", "int8", RTN, {}, "of fused experts it reads integers only packed"),
        ("mixtral", {"type": "fp8", "scales": "static"}, {"name": "fp8"}, {}, "no place for static scales"),
    ],
)
def test_what_cannot_be_is_refused_before_any_compute(
    models_folder: Models,
    text_file: Path,
    tmp_path: Path,
    family: str,
    inputs: Any,
    method: dict[str, Any],
    more: dict[str, Any],
    words: str,
) -> None:
    with pytest.raises(PlanError, match=words):
        run.make_plan(
            recipe(models_folder(family), tmp_path / "out", text_file, method, stage={"inputs": inputs, **more})
        )


def test_gate_and_up_of_an_expert_have_the_same_inputs(models_folder: Models, text_file: Path, tmp_path: Path) -> None:
    layers = {".*gate_proj": {"inputs": None}}
    wanted = recipe(
        models_folder("qwen3-moe"),
        tmp_path / "o",
        text_file,
        {"name": "fp8"},
        stage={"inputs": "fp8", "layers": layers},
    )
    with pytest.raises(PlanError, match="another matrix gets the very same inputs"):
        run.make_plan(wanted)


# --- a reader whose sums round otherwise


def rounding_otherwise(folder: Path, change: float, *, plain: bool = True) -> Callable[..., list[ReadResult]]:
    """A reader that is off by `change` of the spread where it rounds inputs, or, not `plain`, always."""
    nothing: dict[str, Any] = {"missing": [], "unexpected": [], "mismatched": []}
    found = Found(class_name="Llama", load_seconds=1, loaded_bytes=1, peak_bytes=1, **nothing)
    noise = torch.randn(2, 48, 160, generator=torch.Generator().manual_seed(1))

    def measure(requests: list[ReadRequest]) -> list[ReadResult]:
        output = output_as_read(opened(folder), torch.tensor(requests[0].tokens), rounded=requests[0].round_inputs)
        off = change if requests[0].round_inputs or not plain else 0.0
        return [ReadResult(found=found, output=output + off * output.std() * noise)]

    return measure


@pytest.mark.parametrize(
    ("change", "plain", "passed"), [(0.0, True, True), (1e-3, True, True), (0.5, True, False), (1e-3, False, False)]
)
def test_a_reader_that_rounds_some_inputs_the_other_way_is_judged_by_the_weights(
    models_folder: Models,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: float,
    plain: bool,
    passed: bool,
) -> None:
    folder = tmp_path / ("out" if passed else "out.partial")
    monkeypatch.setattr(written, "measure", rounding_otherwise(tmp_path / "out.partial", change, plain=plain))
    source = models_folder("llama", torch.bfloat16)
    if not passed:
        with pytest.raises(GateError, match="inputs not rounded; rounded, it differs by"):
            quantized(source, tmp_path / "out", text_file, "int8", RTN)
        assert folder.is_dir()
        return
    check = quantized(source, tmp_path / "out", text_file, "int8", RTN).stages[0].checks[-1]
    assert check.passed and ("not rounded" in check.detail) == (change > 0)
