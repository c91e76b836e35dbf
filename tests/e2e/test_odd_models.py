"""Models and texts that are out of the ordinary: done right or refused, and said so."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import SMALL, SMALL_METHOD, load, recipe
from tiny import TEXT, build_model, config
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llmshrink import run
from llmshrink.calibration.rows import Rows
from llmshrink.errors import OutputError, PlanError
from llmshrink.io.safetensors import Checkpoint
from llmshrink.model.streamed import StreamedModel
from llmshrink.progress import Silent

pytestmark = pytest.mark.usefixtures("without_reader")
RTN = {"name": "rtn", "group_size": 32}


# --- widths that groups do not divide


@pytest.fixture(scope="module")
def width_72(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd") / "model"
    build_model(folder, config("llama", hidden_size=72, num_attention_heads=4, num_key_value_heads=2))
    return folder


def test_layers_that_groups_do_not_divide_are_named(width_72: Path, text_file: Path, tmp_path: Path) -> None:
    wanted = recipe(width_72, tmp_path / "out", text_file, {"name": "rtn", "group_size": 64})
    with pytest.raises(PlanError, match=r"(?s)layers\.0\.self_attn\.q_proj.*64 does not divide the width 72") as caught:
        run.make_plan(wanted)
    assert (
        caught.value.exit_code == 3 and "down_proj" not in str(caught.value) and "on_indivisible" in str(caught.value)
    )


def test_layers_that_are_skipped_are_exactly_those_a_loader_is_told_of(
    width_72: Path, text_file: Path, tmp_path: Path
) -> None:
    skip = {"stage": {"on_indivisible": "skip"}}
    wanted = recipe(width_72, tmp_path / "out", text_file, {"name": "rtn", "group_size": 64}, **skip)
    plan = run.make_plan(wanted)
    left = {layer.name for block in plan.blocks for layer in block.layers if layer.method is None}
    attention, wide = ("q", "k", "v", "o"), ("gate", "up")
    assert left == {f"model.layers.{i}.self_attn.{n}_proj" for i in range(2) for n in attention} | {
        f"model.layers.{i}.mlp.{n}_proj" for i in range(2) for n in wide
    }
    report = run.execute(wanted, progress=Silent())
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert set(ignored) == left | {"lm_head"}
    assert {event.kind for event in report.events} == {"skipped"}


# --- one matrix under two names


@pytest.mark.parametrize("method", ["gptq", "rtn", "nf4", "fp4"])
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_head_stays_tied_or_apart(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path, family: str, method: str
) -> None:
    source, out = models_folder(family), tmp_path / "out"
    stage = run.execute(recipe(source, out, text_file, {"name": method}), progress=Silent()).stages[0]
    assert stage.bytes_after < 0.6 * stage.bytes_before
    tied = family == "llama-tied"
    assert ("lm_head.weight" in Checkpoint.open(out).infos) is not tied
    model, _ = load(out)
    assert model.config.tie_word_embeddings is tied
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head is not None and (head.weight.data_ptr() == embedding.weight.data_ptr()) is tied


# --- tokenizers


def without_bos(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token": None}))


def with_bos_in_front(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))


def with_padding(folder: Path) -> None:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<s>"})
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("change", [None, without_bos, with_bos_in_front, with_padding])
def test_a_tokenizer_is_used_as_it_is_and_not_written_anew(
    smallest: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    folder, out = shutil.copytree(smallest, tmp_path / "model"), tmp_path / "out"
    if change:
        change(folder)
    before = {path.name: path.read_bytes() for path in folder.glob("*token*")}
    rows: list[Rows] = []
    monkeypatch.setattr(Rows, "save", lambda self, *_: rows.append(self))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a tokenizer is copied, not saved")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", refuse)  # one that cannot be saved is no hindrance
    run.execute(recipe(folder, out, text_file, SMALL_METHOD, **SMALL), progress=Silent())
    assert {path.name: path.read_bytes() for path in out.glob("*token*")} == before
    marks = [int(token) for row in rows[0].tokens for token in row if token == 0]
    assert rows[0].count == 4 * 16 and 0 < len(marks) <= 4  # between texts and never twice: a text has some 20 tokens


# --- too little text, and too much


@pytest.mark.parametrize(("length", "texts", "rows"), [(16, TEXT[:1], 1), (4096, TEXT, 4), (3, ["The old fox"], 1)])
def test_few_or_long_rows_are_told(smallest: Path, tmp_path: Path, length: int, texts: list[str], rows: int) -> None:
    (tmp_path / "text.json").write_text(json.dumps(texts))
    calibration = {"calibration": {"samples": 4, "length": length}}
    wanted = recipe(smallest, tmp_path / "out", tmp_path / "text.json", SMALL_METHOD, **{**SMALL, **calibration})
    report = run.execute(wanted, progress=Silent())
    found = report.calibration
    assert found is not None and found.rows == rows and found.length == min(length, 128)
    kinds = {event.kind for event in report.events}
    assert ("few_rows" in kinds) is (rows < 4) and ("length_cut" in kinds) is (length > 128)


# --- what fails when it is saved fails before compute, or does not fail


def test_a_generation_config_that_transformers_would_not_save_is_kept(
    smallest: Path, text_file: Path, tmp_path: Path
) -> None:
    folder, out = shutil.copytree(smallest, tmp_path / "model"), tmp_path / "out"
    settings = '{"do_sample": false, "temperature": 0.9, "eos_token_id": 0}'
    (folder / "generation_config.json").write_text(settings)
    run.execute(recipe(folder, out, text_file, RTN), progress=Silent())
    assert (out / "generation_config.json").read_text() == settings
    assert load(out)[0].generation_config.temperature == 0.9


def test_a_target_that_cannot_be_written_is_refused_before_compute(
    smallest: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("nothing is computed for an output that cannot be written")

    monkeypatch.setattr(StreamedModel, "record", refuse)
    (tmp_path / "file").touch()
    start = time.perf_counter()
    with pytest.raises(OutputError, match="file: File exists") as caught:
        run.execute(recipe(smallest, tmp_path / "file" / "out", text_file, SMALL_METHOD, **SMALL), progress=Silent())
    assert caught.value.exit_code == 7 and time.perf_counter() - start < 2
