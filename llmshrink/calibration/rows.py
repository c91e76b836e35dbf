"""Rows of token ids for calibration and evaluation.

Packed rows all have one length and no padding: documents are joined with the model's BOS (else EOS) token between
them and cut. With one document to a row, rows keep their own lengths and are never padded either. Every row of an
encoder lies within the tokens that its tokenizer puts around a text, [CLS] and [SEP] for BERT; packed, its documents
have the closing ones between them (the full sentences of RoBERTa, Liu et al. 2019, arXiv 1907.11692, section 4.2).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmshrink.errors import InputError
from llmshrink.forms import Event
from llmshrink.io.files import sealed, unsealed, write_bytes

MIN_ROW = 2  # a row of one token predicts nothing


@dataclass(frozen=True)
class Rows:
    """Token rows with what a report says about them."""

    tokens: tuple[Tensor, ...]  # each int64 [length]
    data: str  # as the recipe names it
    origin: str  # in words
    split: str = ""  # of a dataset

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(len(row) for row in self.tokens)

    @property
    def count(self) -> int:
        """Tokens in all rows."""
        return sum(len(row) for row in self.tokens)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the ids, row by row."""
        digest = hashlib.sha256()
        for row in self.tokens:
            digest.update(len(row).to_bytes(8, "little"))
            digest.update(row.numpy().tobytes())
        return digest.hexdigest()

    def examples(self) -> list[dict[str, Any]]:
        """What a Trainer takes: ids, which are also what follows each other."""
        return [{"input_ids": row, "labels": row} for row in self.tokens]

    def first(self, rows: int, length: int) -> Rows:
        """The first of the rows, cut to a length."""
        return replace(self, tokens=tuple(row[:length] for row in self.tokens[:rows]))

    def batches(self, tokens: int) -> list[Tensor]:
        """Rows stacked into [rows, length] with at most `tokens` tokens (at least one row), in order."""
        found: list[list[Tensor]] = []
        for row in self.tokens:
            if found and len(found[-1][0]) == len(row) and (len(found[-1]) + 1) * len(row) <= tokens:
                found[-1].append(row)
            else:
                found.append([row])
        return [torch.stack(rows) for rows in found]

    def parted(self, tokens: int) -> list[Rows]:
        """Stretches of the rows with at most so many tokens (at least one row), in order."""
        found: list[list[Tensor]] = []
        for row in self.tokens:
            if found and sum(map(len, found[-1])) + len(row) <= tokens:
                found[-1].append(row)
            else:
                found.append([row])
        return [replace(self, tokens=tuple(part)) for part in found]

    def grouped(self, counts: list[int]) -> list[Tensor]:
        """Rows stacked into batches of these numbers of rows, in order."""
        left = iter(self.tokens)
        return [torch.stack(list(itertools.islice(left, count))) for count in counts]

    def save(self, path: Path, key: dict[str, Any], events: list[Event]) -> None:
        """Keep the rows, and what happened while they were made, for a run that goes on; `key` says for which run."""
        tokens = [row.tolist() for row in self.tokens]
        facts = {"data": self.data, "origin": self.origin, "split": self.split, "tokens": tokens}
        write_bytes(path, sealed({"key": key, **facts, "events": [vars(event) for event in events]}))

    @classmethod
    def load(cls, path: Path, key: dict[str, Any]) -> tuple[Rows, list[Event]] | None:
        """What `save` kept for this key, or None where it is missing, damaged, or kept for another."""
        kept = unsealed(path.read_bytes()) if path.is_file() else None
        try:
            if kept is None or kept["key"] != key:
                return None
            tokens = tuple(torch.tensor([*row], dtype=torch.long) for row in kept["tokens"])
            rows = cls(tokens, kept["data"], kept["origin"], kept["split"])
            return rows, [Event(**event) for event in kept["events"]]
        except (LookupError, TypeError, ValueError, RuntimeError):  # whole, but laid out by another release
            return None


@dataclass(frozen=True)
class Frame:
    """Tokens that belong around a row, and around each document in a packed one."""

    start: list[int]
    before: list[int]
    after: list[int]
    end: list[int]

    def row(self, ids: list[int]) -> Tensor:
        """A whole row."""
        return torch.tensor([*self.start, *ids, *self.end], dtype=torch.long)


def _frame_of_encoder(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """What the tokenizer itself puts around a text."""
    found = tokenizer("a", return_special_tokens_mask=True)
    ids, special = found["input_ids"], found["special_tokens_mask"]
    inside = [i for i, mark in enumerate(special) if not mark]
    start, end = ids[: inside[0]], ids[inside[-1] + 1 :]
    return Frame(start, [], end, end)


def _frame_of_decoder(tokenizer: PreTrainedTokenizerBase, packed: bool) -> Frame:
    """BOS in front of every document; where they are packed and there is none, EOS."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    first = bos if bos is not None or not packed else eos
    marks = [] if first is None else [first]
    return Frame([], marks, [], []) if packed else Frame(marks, [], [], [])


def tokenize(
    documents: Iterator[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: int,
    length: int,
    packed: bool,
    data: str,
    encoder: bool = False,
) -> Rows:
    """Turn documents into at most `rows` rows of at most `length` tokens.

    Raises:
        InputError: the text gives not even one row.
    """
    frame = _frame_of_encoder(tokenizer) if encoder else _frame_of_decoder(tokenizer, packed)
    texts = (_ids(text, tokenizer) for text in documents if text)
    found = _pack(texts, frame, rows, length) if packed else _separate(texts, frame, rows, length)
    if not found or not any(len(row) > len(frame.start) + len(frame.end) for row in found):
        raise InputError(
            f"The text {data!r} is too short: it does not fill one row of {length if packed else MIN_ROW} tokens.",
            hint="Give more text, or a smaller length.",
        )
    return Rows(tuple(found), data, data)


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _pack(texts: Iterator[list[int]], frame: Frame, rows: int, length: int) -> list[Tensor]:
    width = length - len(frame.start) - len(frame.end)
    ids: list[int] = []
    for text in texts:
        ids += [*frame.before, *text, *frame.after]
        if len(ids) >= rows * width:
            break
    return [frame.row(ids[i * width : (i + 1) * width]) for i in range(min(rows, len(ids) // max(width, 1)))]


def _separate(texts: Iterator[list[int]], frame: Frame, rows: int, length: int) -> list[Tensor]:
    width = length - len(frame.start) - len(frame.end)
    found: list[Tensor] = []
    for text in texts:
        ids = text[: max(width, 0)]
        if ids and len(row := frame.row(ids)) >= MIN_ROW:
            found.append(row)
        if len(found) == rows:
            break
    return found
