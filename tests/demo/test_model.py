"""The embedded model as it is shipped, and the script that made it."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmshrink.demo import EVALUATION_SEED, MODEL_DIR, stories, train

PERPLEXITY_BOUND = 1.4  # per token on evaluation stories


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, local_files_only=True, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def rows(tokenizer):
    return torch.stack(list(itertools.islice(train.token_rows(tokenizer, EVALUATION_SEED, 256), 16)))


def test_weights_are_small_and_bfloat16() -> None:
    path = MODEL_DIR / "model.safetensors"
    assert path.stat().st_size <= 6_000_000
    with safe_open(path, framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - not a dict
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert 1_000_000 <= sum(tensor.numel() for tensor in tensors) <= 3_000_000


def test_every_width_is_divisible_by_128(model) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features % 128 == 0
            assert module.out_features % 128 == 0
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_tokenizer_puts_the_boundary_first_and_round_trips(tokenizer, model) -> None:
    assert len(tokenizer) == model.config.vocab_size
    for story in itertools.islice(stories(EVALUATION_SEED), 20):
        ids = tokenizer(story).input_ids
        assert ids[0] == tokenizer.bos_token_id == model.generation_config.eos_token_id
        assert tokenizer.decode(ids[1:]) == story
    digits = tokenizer("347", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(digits) == ["3", "4", "7"]
    other = "Zażółć 日本 🙂\n"
    assert tokenizer.decode(tokenizer(other, add_special_tokens=False).input_ids) == other


def test_model_knows_the_stories(model, rows) -> None:
    assert train.perplexity(model, rows) < PERPLEXITY_BOUND


def test_coarse_rounding_hurts_and_fine_rounding_hardly(model, rows) -> None:
    exact = train.perplexity(model, rows)
    eight, four, three, two = (train.perplexity(train.rounded(model, bits), rows) / exact for bits in (8, 4, 3, 2))
    assert 0.999 < eight < 1.001
    assert four < 1.01 < three < 1.05
    assert two > 1.2


def test_model_continues_a_story(model, tokenizer) -> None:
    prompt = tokenizer("Long ago there lived a weaver called Petra in", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0]
    assert "Petra in Coldbrook, high in the hills." in tokenizer.decode(ids)


def test_model_ends_a_story_with_the_boundary(model, tokenizer) -> None:
    story = tokenizer(next(stories(EVALUATION_SEED)), return_tensors="pt")
    assert model(**story).logits[0, -1].argmax() == tokenizer.eos_token_id


def test_training_record_fits_the_model(model) -> None:
    record = json.loads((MODEL_DIR / "TRAINING.json").read_text(encoding="utf-8"))
    assert record["parameters"] == model.num_parameters()
    assert record["perplexity"] < PERPLEXITY_BOUND
    assert list(record["perplexity_rtn_g128"]) == ["8", "4", "3", "2"]


@pytest.fixture
def same_threads_after():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("same_threads_after")
def test_training_script_runs(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(tmp_path), "--steps", "2", "--threads", "1"])
    train.main()
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in MODEL_DIR.iterdir()}
    # The vocabulary and the shape depend on the text and the settings alone, so they come out the same everywhere.
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == AutoTokenizer.from_pretrained(MODEL_DIR).get_vocab()
    made, shipped = (AutoConfig.from_pretrained(folder).to_diff_dict() for folder in (tmp_path, MODEL_DIR))
    assert made.pop("transformers_version") == transformers.__version__
    shipped.pop("transformers_version")
    assert made == shipped
    record = json.loads((tmp_path / "TRAINING.json").read_text(encoding="utf-8"))
    assert record["settings"]["steps"] == 2
    assert "loss" in capsys.readouterr().out
