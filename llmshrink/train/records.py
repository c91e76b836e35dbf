"""From entries of a file or a dataset to tokens, and which of them the loss is taken on.

Three kinds of entry, told apart by their keys: a text; a prompt with its answer; and a conversation, a list of messages
that the tokenizer's own template lays out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, takewhile
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from llmshrink.calibration.rows import frame_of_decoder, frame_of_encoder
from llmshrink.calibration.text import Record, text_column, text_of
from llmshrink.errors import InputError
from llmshrink.recipe.train import TrainSpec
from llmshrink.train.chat import Chat

Kind = Literal["text", "prompt", "chat"]
PAIRS = (("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
STRETCH = 1 << 18  # characters that are tokenized together


@dataclass(frozen=True, slots=True)
class Example:
    """The tokens of one entry."""

    ids: NDArray[np.int32]
    learned: NDArray[np.bool_]  # of each token: whether the loss is taken on it
    where: str  # the entry stands


class Records:
    """Reads the entries of one text.

    Attributes:
        kind: What they are; of `auto` only known once the first is there.
    """

    def __init__(self, spec: TrainSpec, tokenizer: PreTrainedTokenizerBase) -> None:
        """`spec` says what the entries are, `tokenizer` is the model's."""
        self._spec, self._tokenizer = spec, tokenizer
        self.kind: Kind | None = None if spec.kind == "auto" else spec.kind
        self._column = spec.column  # of texts
        self._begun = False  # its keys were seen

    def columns(self, names: list[str], where: str) -> list[str]:
        """Which columns of a table are read; what the first entry is by its keys, all others are."""
        self._begun = True
        kind = self.kind = self.kind or kind_of(names, self._spec.column)
        if kind == "text":
            self._column = text_column(names, self._column, where)
            return [self._column]
        keys = ("messages", "tools") if kind == "chat" else ("input", *pair_of(names, where))
        return [name for name in names if name in keys]

    def examples(self, records: Iterable[Record]) -> Iterator[Example]:
        """The tokens of every entry, in order.

        Raises:
            InputError: an entry, which is named, is not of this kind, or says nothing.
        """
        for batch in _together(records):
            if not self._begun and isinstance(batch[0].value, dict):
                self.columns(list(batch[0].value), batch[0].where)
            self._begun, self.kind = True, self.kind or "text"
            yield from self._encode(batch)

    @property
    def _encode(self) -> Callable[[list[Record]], Iterator[Example]]:
        if self.kind == "chat":
            return partial(_chats, Chat(self._tokenizer, answers_only=self._spec.answers_only))
        return self._prompts if self.kind == "prompt" else self._texts

    def _texts(self, records: list[Record]) -> Iterator[Example]:
        start = frame_of_decoder(self._tokenizer, self._spec.packing)
        for record, ids in zip(records, self._ids([self._text(record) for record in records]), strict=True):
            if ids:
                yield _example([*start.start, *start.before, *ids], 0, record)

    def _text(self, record: Record) -> str:
        """Refuse what has an answer where the first entry had none: it would not be learned."""
        keys = list(record.value) if isinstance(record.value, dict) else []
        if self._spec.kind == "auto" and (kind := kind_of(keys, self._spec.column)) != "text":
            what = {"prompt": "a prompt with its answer", "chat": "a conversation"}[kind]
            raise InputError(
                f"{record.where} is {what} by its keys ({', '.join(keys)}), and the first entry is a text.",
                hint="Give entries of one kind, or say which key holds the text (train.column).",
            )
        return text_of(record, self._column)

    def _prompts(self, records: list[Record]) -> Iterator[Example]:
        """Both parts are one text: apart, many tokenizers would put a space between them."""
        pairs = [prompt_of(record) for record in records]
        start, end = frame_of_encoder(self._tokenizer).start, self._tokenizer.eos_token_id
        for record, ids, asked in zip(records, *self._joined(pairs), strict=True):
            whole = [*start, *ids, *([] if end is None else [end])]
            yield _example(whole, len(start) + asked if self._spec.answers_only else 0, record)

    def _joined(self, pairs: list[tuple[str, str]]) -> tuple[list[list[int]], list[int]]:
        """The tokens of each prompt with its answer, and how many of them lie in the prompt alone."""
        whole = [asked + answer for asked, answer in pairs]
        if not self._tokenizer.is_fast:  # it does not say where a token ends: those that the prompt has alone
            ids = self._ids(whole)
            alone = self._ids([asked for asked, _ in pairs])
            return ids, [_in_common(*both) for both in zip(ids, alone, strict=True)]
        ids, ends = self._encoded(whole)
        inside = [sum(end <= len(asked) for end in found) for found, (asked, _) in zip(ends, pairs, strict=True)]
        return ids, inside

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each text."""
        return self._encoded(texts, ends=False)[0]

    def _encoded(self, texts: list[str], *, ends: bool = True) -> tuple[list[list[int]], list[list[int]]]:
        """The tokens of each text, of a long one stretch by stretch; and behind which character each of them ends."""
        parts = [list(_stretches(text)) for text in texts]
        flat = [part for text in parts for part in text]
        asked = {"add_special_tokens": False, "verbose": False, "return_offsets_mapping": ends}
        found = self._tokenizer(flat, **asked) if flat else {"input_ids": [], "offset_mapping": []}
        ids = iter(found["input_ids"])
        joined = [[token for _ in text for token in next(ids)] for text in parts]
        if not ends:
            return joined, []
        offsets = iter(found["offset_mapping"])
        starts = [accumulate(map(len, text[:-1]), initial=0) for text in parts]
        return joined, [[start + end for start in text for _, end in next(offsets)] for text in starts]


def kind_of(names: Iterable[str], column: str | None) -> Kind:
    """What entries with these keys are; whoever names a column means text."""
    known = set(names)
    if column is not None:
        return "text"
    if "messages" in known:
        return "chat"
    pairs = PAIRS[:1] if "text" in known else PAIRS
    return "prompt" if any(known.issuperset(pair) for pair in pairs) else "text"


def pair_of(names: Iterable[str], where: str) -> tuple[str, str]:
    """The keys of a prompt and of its answer.

    Raises:
        InputError: they are not there.
    """
    known = list(names)
    found = next((pair for pair in PAIRS if set(pair) <= set(known)), None)
    if found is None:
        wanted = ", or ".join(f"{asked!r} and {answer!r}" for asked, answer in PAIRS)
        raise InputError(f"{where}: expected the keys {wanted}; it has: {', '.join(known)}.")
    return found


def prompt_of(record: Record) -> tuple[str, str]:
    """A prompt, and what is to follow it.

    A prompt and its completion are joined as they are; a question or an instruction stands on lines of its own.

    Raises:
        InputError: a key is missing, is no text, or the answer is empty.
    """
    value = record.value
    if not isinstance(value, dict):
        raise InputError(f"{record.where}: expected an object with a prompt and its answer.")
    pair = pair_of(value, record.where)
    for key in pair:
        if not isinstance(value[key], str):
            raise InputError(f"{record.where}: expected a string under {key!r}.")
    asked, answer = (value[key] for key in pair)
    if not answer.strip():
        raise InputError(f"{record.where}: the answer under {pair[1]!r} is empty.")
    if pair[0] == "instruction" and value.get("input"):
        if not isinstance(value["input"], str):
            raise InputError(f"{record.where}: expected a string under 'input'.")
        asked += f"\n{value['input']}"
    return asked if pair == PAIRS[0] else f"{asked}\n", answer


def _chats(chat: Chat, records: list[Record]) -> Iterator[Example]:
    for record in records:
        ids, learned = chat.encode(record)
        yield Example(np.asarray(ids, dtype=np.int32), np.asarray(learned, dtype=np.bool_), record.where)


def _example(ids: list[int], asked: int, record: Record) -> Example:
    """The first `asked` tokens are only read."""
    learned = np.ones(len(ids), dtype=np.bool_)
    learned[:asked] = False
    return Example(np.asarray(ids, dtype=np.int32), learned, record.where)


def _in_common(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(one, other, strict=False)))


def _together(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Entries of about so many characters as are tokenized together; there may be a longer one."""
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += _size(record.value)
        if size >= STRETCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _size(value: Any) -> int:
    """Characters, roughly."""
    if isinstance(value, dict | list):
        return sum(_size(part) for part in (value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, str) else 8


def _stretches(text: str) -> Iterator[str]:
    """A text in parts that end where a word does: what a tokenizer remembers of a text is many times its size."""
    start = 0
    while len(text) - start > STRETCH:
        space = max(text.rfind(" ", start + 1, start + STRETCH), text.rfind("\n", start + 1, start + STRETCH))
        end = space if space > start else start + STRETCH
        yield text[start:end]
        start = end
    yield text[start:]
