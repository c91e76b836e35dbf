"""Documents become rows of token ids: packed or one to a row, never padded, with a fingerprint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny import TEXT
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llmshrink.calibration.rows import Rows, tokenize
from llmshrink.errors import InputError


@pytest.fixture
def tokenizer(models_folder: Callable[..., Path]) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(models_folder("llama"))


def rows_of(tokenizer: PreTrainedTokenizerBase, documents: list[str], **more: object) -> Rows:
    settings = {"rows": 6, "length": 16, "packed": True, "data": "some text"}
    return tokenize(iter(documents), tokenizer, **{**settings, **more})


def test_packed_rows_are_the_documents_end_to_end(tokenizer: PreTrainedTokenizerBase) -> None:
    found = rows_of(tokenizer, ["", *TEXT])
    flat = torch.cat(found.tokens).tolist()
    expected = [i for text in TEXT for i in [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]]
    assert flat == expected[: 6 * 16]  # an empty document leaves no separator
    assert [len(row) for row in found.tokens] == [16] * 6 and found.length == 16 and found.count == 96


@pytest.mark.parametrize(("bos", "eos", "separator"), [("<s>", None, "<s>"), (None, "<s>", "<s>"), (None, None, None)])
def test_documents_are_joined_by_bos_else_eos_else_nothing(
    tokenizer: PreTrainedTokenizerBase, bos: str | None, eos: str | None, separator: str | None
) -> None:
    tokenizer.bos_token, tokenizer.eos_token = bos, eos
    row = rows_of(tokenizer, TEXT, rows=1, length=8).tokens[0]
    assert (row[0] == tokenizer.convert_tokens_to_ids("<s>")) == (separator is not None)


def test_separate_rows_keep_their_own_lengths(tokenizer: PreTrainedTokenizerBase) -> None:
    found = rows_of(tokenizer, [TEXT[0], "", "The", TEXT[1] * 9], rows=3, packed=False, length=64)
    lengths = [1 + len(tokenizer(TEXT[0])["input_ids"]), 2, 64]
    assert [len(row) for row in found.tokens] == lengths  # an empty document is a lone BOS: it predicts nothing
    assert all(row[0] == tokenizer.bos_token_id for row in found.tokens)
    assert found.length == 64


@pytest.mark.parametrize("packed", [True, False])
def test_rows_of_an_encoder_lie_between_its_own_marks(models_folder: Callable[..., Path], packed: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models_folder("bert"))
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    texts = [TEXT[0], "", "The", TEXT[1] * 9]
    found = rows_of(tokenizer, texts, rows=3, packed=packed, length=20, encoder=True).tokens
    if packed:  # the inner tokens, end to end, are the documents with [SEP] after each
        flat = [i for row in found for i in row[1:-1].tolist()]
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts if text]
        assert flat == [i for text in ids for i in [*text, sep]][: 3 * 18]
        assert [len(row) for row in found] == [20] * 3
    else:
        assert [row.tolist() for row in found] == [
            tokenizer(text, truncation=True, max_length=20)["input_ids"] for text in texts if text
        ]
    assert all(row[0] == cls and row[-1] == sep for row in found)


def test_no_more_is_read_than_is_needed(tokenizer: PreTrainedTokenizerBase) -> None:
    def endless() -> Iterator[str]:
        while True:
            yield TEXT[0]

    for packed in (True, False):
        settings = {"rows": 3, "length": 8, "packed": packed, "data": "endless"}
        assert len(tokenize(endless(), tokenizer, **settings).tokens) == 3


@pytest.mark.parametrize("packed", [True, False])
def test_too_little_text_is_told(tokenizer: PreTrainedTokenizerBase, packed: bool) -> None:
    with pytest.raises(InputError, match="'some text' is too short") as caught:
        rows_of(tokenizer, ["", ""] if not packed else ["A"], packed=packed)
    assert caught.value.exit_code == 8


def test_a_text_may_give_fewer_rows(tokenizer: PreTrainedTokenizerBase) -> None:
    assert 0 < len(rows_of(tokenizer, TEXT[:2], rows=50, length=8).tokens) < 50


def rows(*values: list[int]) -> Rows:
    return Rows(tuple(torch.tensor(value) for value in values), "a", "a")


def test_the_fingerprint_is_that_of_the_ids_and_of_where_rows_end() -> None:
    assert rows([1, 2], [3]).fingerprint == Rows(rows([1, 2], [3]).tokens, "b", "c").fingerprint
    several = [rows([1, 2], [3]), rows([1], [2, 3]), rows([1, 2, 3]), rows([3], [1, 2]), rows([1, 2], [4])]
    assert len({found.fingerprint for found in several}) == len(several)


def test_batches_hold_rows_of_one_length_in_order() -> None:
    def shapes(found: list[Tensor]) -> list[tuple[int, ...]]:
        return [tuple(batch.shape) for batch in found]

    same = rows(*([i] * 4 for i in range(5)))
    assert shapes(same.batches(8)) == [(2, 4), (2, 4), (1, 4)]
    assert shapes(same.batches(3)) == [(1, 4)] * 5  # a row is never cut
    assert torch.equal(torch.cat(same.batches(8)), torch.stack(same.tokens))
    assert shapes(rows([1, 1], [2, 2], [3], [4, 4]).batches(100)) == [(2, 2), (1, 1), (1, 2)]
