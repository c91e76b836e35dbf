"""Tokenizers in llama.cpp's words; that it reads them so is shown by tests/readers/test_llamacpp.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import config, save_tokenizer, save_word_pieces
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vocabularies import BYTES, SENTENCEPIECE, save

from llmshrink.demo import MODEL_DIR
from llmshrink.errors import PlanError
from llmshrink.gguf.splits import WAYS, ways
from llmshrink.gguf.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, vocabulary

CONFIG = config("llama")


def words(tokenizer: PreTrainedTokenizerFast, more: int = 3) -> tuple[dict[str, Any], list[str]]:
    found, notes = vocabulary(tokenizer, CONFIG, len(tokenizer) + more)
    return {key.removeprefix("tokenizer.ggml."): value for key, value in found.items()}, notes


def changed(tmp_path: Path, kind: str, edit: Any) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokenizer.json was edited."""
    save(kind, tmp_path)
    path = tmp_path / "tokenizer.json"
    described = json.loads(path.read_text())
    edit(described)
    tokenizer = Tokenizer.from_str(json.dumps(described))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", BYTES)
def test_byte_level_merges_are_recognised_by_what_they_do(tmp_path: Path, kind: str) -> None:
    tokenizer = save(kind, tmp_path)
    found, notes = words(tokenizer)
    assert (found["model"], found["pre"]) == ("gpt2", kind)
    assert found["tokens"][:2] == ["<s>", "</s>"] and found["token_type"][:3] == [CONTROL, CONTROL, NORMAL]
    assert found["tokens"][-4:] == ["<|x|>", "[PAD601]", "[PAD602]", "[PAD603]"]
    assert found["token_type"][-4:] == [USER_DEFINED, UNUSED, UNUSED, UNUSED]
    first = found["merges"][0].split(" ")
    assert "".join(first) in found["tokens"] and len(first) == 2
    assert (found["bos_token_id"], found["eos_token_id"]) == (0, 1)
    assert (found["add_bos_token"], found["add_eos_token"]) == (kind == "llama-bpe", False)
    assert ["ASCII" in note for note in notes] == [True] * (kind in ("tekken", "gpt-4o"))


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_sentencepiece_has_scores_in_the_order_of_its_merges(tmp_path: Path, kind: str) -> None:
    tokenizer = save(kind, tmp_path)
    found, notes = words(tokenizer)
    assert (found["model"], found["add_space_prefix"]) == ("llama", kind != "gemma")
    types, tokens = found["token_type"], found["tokens"]
    assert types[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE] and types.count(BYTE) == 256
    scores = dict(zip(tokens, found["scores"], strict=True))
    merged = [text for text, type in zip(tokens, types, strict=True) if type == NORMAL and len(text) > 1]
    ordered = sorted(merged, key=lambda text: -scores[text])
    assert ordered == merged, "a token's score was its place"
    assert (found["unknown_token_id"], found["bos_token_id"], found["add_bos_token"]) == (0, 1, True)
    assert bool(notes) == (kind == "llama-new")


def test_the_embedded_model_has_a_vocabulary() -> None:
    found, notes = words(AutoTokenizer.from_pretrained(MODEL_DIR), 0)
    assert (found["pre"], found["add_bos_token"], notes) == ("smollm", True, [])


def test_a_chat_template_is_passed_on(tmp_path: Path) -> None:
    tokenizer = save("gpt-2", tmp_path)
    tokenizer.chat_template = "{{ messages }}"
    assert words(tokenizer)[0]["tokenizer.chat_template"] == "{{ messages }}"
    tokenizer.chat_template = {"default": "{{ a }}", "tools": "{{ b }}"}
    assert words(tokenizer)[0]["tokenizer.chat_template"] == "{{ a }}"


def test_tokens_beyond_the_embedding_are_left_out(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.pad_token = "<|new|>"
    found, _ = words(tokenizer, -1)
    assert len(found["tokens"]) == len(tokenizer) - 1 and "padding_token_id" not in found


def test_the_configuration_says_where_texts_end_if_the_tokenizer_does_not(tmp_path: Path) -> None:
    save("gpt-2", tmp_path)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert vocabulary(tokenizer, config("llama", eos_token_id=[7, 8]), 610)[0]["tokenizer.ggml.eos_token_id"] == 7
    with pytest.raises(PlanError, match="which token ends a text"):
        vocabulary(tokenizer, config("llama", eos_token_id=None), 610)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.mark.parametrize(
    "cut",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        pre_tokenizers.Whitespace(),
        split(r"\p{N}{1,2}|\p{L}+"),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(False)]),
        None,
    ],
)
def test_other_ways_to_cut_are_refused(tmp_path: Path, cut: pre_tokenizers.PreTokenizer | None) -> None:
    tokenizer = save("gpt-2", tmp_path)
    if cut is None:
        tokenizer = changed(tmp_path, "gpt-2", lambda found: found.update(pre_tokenizer=None))
    else:
        tokenizer.backend_tokenizer.pre_tokenizer = cut
    with pytest.raises(PlanError, match="none of llama.cpp's"):
        words(tokenizer)


def test_no_two_ways_are_one() -> None:
    names = [way.name for found in WAYS.values() for way in found]
    assert len(names) == len(set(names)) == len(BYTES)
    assert len(ways({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True})) == 1


def test_whole_tokens_may_come_first_only_if_it_changes_nothing(tmp_path: Path) -> None:
    tokenizer = save("qwen2", tmp_path)
    tokenizer.backend_tokenizer.model.ignore_merges = True
    assert words(tokenizer)[0]["pre"] == "qwen2"
    assert tokenizer.backend_tokenizer.model.ignore_merges, "it is left as it was"

    def unreachable(found: dict[str, Any]) -> None:
        found["model"]["ignore_merges"] = True
        found["model"]["merges"].pop()

    with pytest.raises(PlanError, match="ignore_merges"):
        words(changed(tmp_path, "qwen2", unreachable))


def test_merges_that_no_scores_say_are_refused(tmp_path: Path) -> None:
    def fewer(found: dict[str, Any]) -> None:
        merges = found["model"]["merges"]
        joined = ["".join(merge) for merge in merges]
        merges.remove(next(merge for merge, text in zip(merges, joined, strict=True) if joined.count(text) > 1))

    with pytest.raises(PlanError, match="not those of a SentencePiece model"):
        words(changed(tmp_path, "llama", fewer))

    def apart(found: dict[str, Any]) -> None:
        merges = found["model"]["merges"]
        joined = ["".join(merge) for merge in merges]
        merges.append(merges.pop(next(n for n, text in enumerate(joined) if joined.count(text) > 1)))

    with pytest.raises(PlanError, match="not those of a SentencePiece model"):
        words(changed(tmp_path, "llama", apart))


def test_other_spaces_and_missing_bytes_are_refused(tmp_path: Path) -> None:
    tokenizer = save("llama", tmp_path)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(PlanError, match="spaces are not those of SentencePiece"):
        words(tokenizer)

    def without(found: dict[str, Any]) -> None:
        vocab = found["model"]["vocab"]
        vocab["<0XFF>"] = vocab.pop("<0xFF>")

    with pytest.raises(PlanError, match="255"):
        words(changed(tmp_path, "llama", without))


def test_a_normalizer_is_refused_but_for_nfc_which_is_told(tmp_path: Path) -> None:
    tokenizer = save("qwen2", tmp_path)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert "NFC" in words(tokenizer)[1][0]
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(PlanError, match="change a text"):
        words(tokenizer)


@pytest.mark.parametrize(
    ("single", "around"),
    [("<s> $A", (True, False)), ("$A </s>", (False, True)), ("<s> $A </s>", (True, True)), ("$A", (False, False))],
)
def test_first_and_last_tokens_are_said(tmp_path: Path, single: str, around: tuple[bool, bool]) -> None:
    tokenizer = save("gpt-2", tmp_path)
    template = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    found, _ = words(tokenizer)
    assert (found["add_bos_token"], found["add_eos_token"]) == around


@pytest.mark.parametrize("single", ["</s> $A", "<s> <s> $A", "$A <s>"])
def test_other_tokens_around_a_text_are_refused(tmp_path: Path, single: str) -> None:
    tokenizer = save("gpt-2", tmp_path)
    special = [("<s>", 0), ("</s>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    with pytest.raises(PlanError, match="bos_token and eos_token"):
        words(tokenizer)


def test_special_tokens_that_take_spaces_away_are_told(tmp_path: Path) -> None:
    def strip(found: dict[str, Any]) -> None:
        found["added_tokens"][0]["rstrip"] = True

    assert "spaces beside special tokens" in words(changed(tmp_path, "gpt-2", strip))[1][0]


def test_word_pieces_are_refused(tmp_path: Path) -> None:
    save_word_pieces(tmp_path)
    with pytest.raises(PlanError, match="WordPiece"):
        words(AutoTokenizer.from_pretrained(tmp_path))
