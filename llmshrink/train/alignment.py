"""Two tokenizers on one text: where both end a token at the same character, and which of their tokens begin alike.

A teacher that reads other tokens reads the student's text again in its own. Where both have seen the same text so far,
both say how it goes on, and only there can they be compared (ULD, Boizard et al. 2024, arXiv 2402.12030; by the text
that tokens stand for, as in TRL's GOLD). What tokens stand for is what their own decoders make of them, one after
another: within a character of several bytes no token ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"  # what decoders make of bytes that are no character
BEFORE = ("\n", "a", ".")  # what may stand before a text without becoming one token with it


class Alignment:
    """From rows of a student's tokens to rows of its teacher's."""

    def __init__(self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
        """`student`, `teacher`: both fast ones."""
        self._student, self._teacher = student, teacher
        marks = (student.bos_token_id, student.eos_token_id, student.pad_token_id)
        self._marks = {mark for mark in marks if mark is not None}
        self._mark = _mark(teacher)

    def row(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """The teacher's tokens for a row of the student's, and for each position of these the one of those, or -1."""
        made: list[int] = [] if self._mark is None or ids[:1] and ids[0] in self._marks else [self._mark]
        places: list[int] = []
        for mark, segment in self._segments(ids):
            if mark:
                places += [-1] * (mark - 1) + [-1 if self._mark is None else len(made)]
                made += [] if self._mark is None else [self._mark]
            others, found = self._between(segment, len(made))
            made += others
            places += found
        return made, places

    def _segments(self, ids: list[int]) -> Iterator[tuple[int, list[int]]]:
        """Stretches of text, each with how many marks stand before it."""
        marks, segment = 0, list[int]()
        for token in ids:
            if token in self._marks:
                if segment:
                    yield marks, segment
                    marks, segment = 0, []
                marks += 1
            else:
                segment.append(token)
        yield marks, segment

    def _between(self, segment: list[int], start: int) -> tuple[list[int], list[int]]:
        """The teacher's tokens of a text, which stand from `start` on, and the places of the student's among them."""
        text, ends = spelled(self._student, segment)
        others: list[int] = self._teacher(text, add_special_tokens=False, verbose=False)["input_ids"]
        again, other_ends = spelled(self._teacher, others)
        same = len(os.path.commonprefix([text, again]))  # a tokenizer may change what it reads
        at = {end: start + i for i, end in enumerate(other_ends) if end is not None and end <= same}
        return others, [-1 if end is None else at.get(end, -1) for end in ends]

    def classes(self) -> tuple[list[int], list[int]]:
        """The class of each token of the student and of the teacher, -1 of those that have none.

        One may have a token for what is several to the other, so tokens are compared by how they begin: by the longest
        piece that both read as one token in front of them. Of one tokenizer each token is a class of its own.
        """
        tables = [_texts(tokenizer) for tokenizer in (self._student, self._teacher)]
        every = sorted({text for table in tables for text in table.values()})
        one, other = (
            _beginnings(tokenizer, every, table)
            for tokenizer, table in zip((self._student, self._teacher), tables, strict=True)
        )
        numbers: dict[str, int] = {}
        found = []
        for tokenizer, table in zip((self._student, self._teacher), tables, strict=True):
            classes = [-1] * len(tokenizer)
            for token, text in table.items():
                piece = _common(text, one, other)
                if piece is not None:
                    classes[token] = numbers.setdefault(piece, len(numbers))
            found.append(classes)
        marks = (_mark(self._student), self._mark)
        if marks[0] is not None and marks[1] is not None:
            found[0][marks[0]] = found[1][marks[1]] = len(numbers)
        return found[0], found[1]


def spelled(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[str, list[int | None]]:
    """The text of some tokens, and how long it is behind each; None where a token ends within a character."""
    backend = tokenizer.backend_tokenizer
    stream, text, ends = DecodeStream(skip_special_tokens=False), "", list[int | None]()
    for token in ids:
        try:
            piece = stream.step(backend, token)
        except Exception:  # noqa: BLE001 - of the library's own: no stream goes on behind some odd sequences
            stream = DecodeStream(skip_special_tokens=False)
            piece = stream.step(backend, token)
        text += piece or ""
        ends.append(len(text) if piece else None)
    return text, ends


def _mark(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """What stands before each document of a row."""
    found: int | None = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return found


def _texts(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """What tokens stand for within a text; nothing of those that are part of a character, or special."""
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = len(tokenizer.decode(before, clean_up_tokenization_spaces=False))
    ids = [i for i in range(len(tokenizer)) if i not in set(tokenizer.all_special_ids)]
    rows = tokenizer.batch_decode([[*before, i] for i in ids], clean_up_tokenization_spaces=False)
    texts = {i: row[start:] for i, row in zip(ids, rows, strict=True)}
    return {i: text for i, text in texts.items() if text and BROKEN not in text}


def _beginnings(tokenizer: PreTrainedTokenizerBase, texts: list[str], known: dict[int, str]) -> dict[str, str]:
    """Of texts, read within a text, what the first token stands for, where there is one."""
    found: dict[str, str] = {}
    for before in BEFORE:
        start: list[int] = tokenizer(before, add_special_tokens=False)["input_ids"]
        left = [text for text in texts if text not in found]
        if not left:
            break
        rows = tokenizer([before + text for text in left], add_special_tokens=False, verbose=False)["input_ids"]
        for text, row in zip(left, rows, strict=True):
            if row[: len(start)] == start and len(row) > len(start) and row[len(start)] in known:
                found[text] = known[row[len(start)]]
    return found


def _common(text: str, one: dict[str, str], other: dict[str, str]) -> str | None:
    """The longest beginning of a text that both read as one token; None: there is none."""
    while True:
        piece = one.get(text)
        again = None if piece is None else other.get(piece)
        if again is None or again == text:
            return again
        text = again
