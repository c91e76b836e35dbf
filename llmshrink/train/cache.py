"""A teacher's words on disk: `cache.json` says whose they are, shards hold them, rows are found by what they say.

A shard is a safetensors file of some rows: `rows` uint8 [rows, 16], the first bytes of the SHA-256 of each row's token
ids (int32); `positions` int32 [rows], how many of each are told of, all but its last; and of all these positions
`tokens` uint8 [positions, bytes], the k tokens of each in rising order, as `formats/sets.py` packs them; in that order
`logs` uint8 [positions, k], of their log chances at temperature 1 codes c that mean -25 (c / 255)^2; `threshold`
float32 [positions] where tokens were drawn and `shift` where the temperature is another one, as in `sparse.Sparse`. Of
the two codes around a chance one is drawn, so that it is exact on average; steps are 4 % of a chance of a third, and
12 % of one of 1e-4.

Students of other runs find their rows whatever their order and number, and one that is not there is refused before any
step; neither the trainer nor a collator has to number rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llmshrink.errors import InputError
from llmshrink.formats.sets import pack_sets, unpack_sets
from llmshrink.io.files import has_hash
from llmshrink.io.safetensors import read_header
from llmshrink.plan.cache import AGAIN, FACTS, Kind, read_facts
from llmshrink.report.schema import CacheReport
from llmshrink.train.sparse import Sparse

OPEN = 64  # shards that are mapped at a time
LEAST = -1e4  # a log chance of what has none
DEEPEST = 25.0  # a log chance is not below minus that

Place = tuple[int, int, int]  # of a row: its shard, its first position there, how many


def key_of(row: Tensor) -> bytes:
    """What a row of token ids is found by."""
    return hashlib.sha256(row.to("cpu", torch.int32).numpy().tobytes()).digest()[:16]


def names(kind: Kind) -> list[str]:
    """The tensors of a shard that hold words."""
    return ["tokens", "logs", *["threshold"] * kind.drawn, *["shift"] * kind.softened]


def coded(logs: Tensor, dither: Tensor) -> Tensor:
    """Codes uint8 of log chances, exact on average over `dither`: numbers in [0, 1), float32, one for each."""
    place = (logs.clamp(-DEEPEST, 0) / -DEEPEST).sqrt() * 255
    low, high = place.floor(), place.ceil()  # codes: the low one is the larger chance
    larger, smaller, chance = meant(low).exp(), meant(high).exp(), logs.clamp(min=-DEEPEST).exp()
    share = ((larger - chance) / (larger - smaller)).nan_to_num(0)  # of draws that give the high one
    return torch.where(dither < share, high, low).to(torch.uint8)


def meant(codes: Tensor) -> Tensor:
    """Log chances, float32."""
    return -DEEPEST * (codes.float() / 255).square()


def packed(words: Sparse, kind: Kind, dither: Tensor) -> dict[str, Tensor]:
    """Words as a shard holds them; `dither` [positions, k] as in `coded`."""
    tokens, order = words.tokens.sort(-1)
    tensors = {
        "tokens": pack_sets(tokens, kind.vocabulary),
        "logs": coded(words.logs.gather(-1, order), dither),
        "threshold": words.threshold,
        "shift": words.shift,
    }
    return {name: tensors[name] for name in names(kind)}


def unpacked(tensors: dict[str, Tensor], kind: Kind) -> Sparse:
    """Words as they are used; `tensors` as `packed` made them."""
    logs = meant(tensors["logs"])
    return Sparse(
        unpack_sets(tensors["tokens"], kind.tokens, kind.vocabulary),
        logs,
        tensors["shift"] if kind.softened else torch.zeros(len(logs)),
        tensors["threshold"] if kind.drawn else torch.full((len(logs),), -torch.inf),
        kind.temperature,
        rest=not kind.drawn,
    )


class Cache:
    """A finished cache, mapped from its files.

    Attributes:
        facts: What `cache.json` says.
        kind: Of its words.
    """

    def __init__(self, folder: Path) -> None:
        """Open it and see that it is whole.

        Raises:
            InputError: it is damaged, or of a version that is not known.
        """
        facts = read_facts(folder)
        assert facts is not None
        self.facts, self._folder, self.kind = facts, folder, Kind(**facts["kind"])
        self._paths = [folder / Path(shard["file"]).name for shard in facts["shards"]]
        for path, shard in zip(self._paths, facts["shards"], strict=True):
            if path.is_symlink() or not has_hash(path, shard["sha256"]):
                raise InputError(f"{path} is damaged or gone.", hint=AGAIN)
        self._open = lru_cache(OPEN)(self._mapped)
        self._rows = {key: place for shard in range(len(self._paths)) for key, place in self._places(shard)}

    def _mapped(self, shard: int) -> Any:
        return safe_open(self._paths[shard], framework="pt")

    def _places(self, shard: int) -> Iterator[tuple[bytes, Place]]:
        infos, kind = read_header(self._paths[shard]), self.kind
        file, start = self._mapped(shard), 0
        told = int(file.get_tensor("positions").sum()) if "positions" in infos else 0
        right = {"tokens": (told, kind.set_bytes), "logs": (told, kind.tokens)}
        if any(name not in infos or infos[name].shape != right.get(name, (told,)) for name in names(kind)):
            raise InputError(f"{self._paths[shard]} does not hold what {FACTS} says.", hint=AGAIN)
        for key, count in zip(file.get_tensor("rows").tolist(), file.get_tensor("positions").tolist(), strict=True):
            yield bytes(key), (shard, start, count)
            start += count

    def check(self, rows: Iterable[Tensor]) -> None:
        """Refuse rows of which nothing is known.

        Raises:
            InputError: there are some.
        """
        known = [key_of(row) in self._rows for row in rows]
        if not all(known):
            raise InputError(
                f"{known.count(False)} of {len(known)} rows are not in the cache {self._folder}, the first of them row "
                f"{known.index(False)}: it was made of another text, or of rows of another length.",
                hint="Give the text and train.length that it was made with, or name another cache.folder.",
            )

    def row(self, ids: Tensor) -> Sparse:
        """The words of one row of token ids [length]: of its positions but the last."""
        shard, start, count = self._rows[key_of(ids)]
        file = self._open(shard)
        tensors = {name: file.get_slice(name)[start : start + count] for name in names(self.kind)}
        try:
            found = unpacked(tensors, self.kind)
        except ValueError as error:
            raise InputError(f"{self._paths[shard]}, tokens: {error}.", hint=AGAIN) from error
        if int(found.tokens.max()) >= self.kind.vocabulary:
            raise InputError(f"{self._paths[shard]} names tokens that there are not.", hint=AGAIN)
        return found

    def report(self) -> CacheReport:
        """What is told of it."""
        size = sum(path.stat().st_size for path in (*self._paths, self._folder / FACTS))
        told = {key: self.facts[key] for key in ("covered", "positions", "seconds")}
        per_token = size / self.facts["positions"]
        return CacheReport(**asdict(self.kind), **told, bytes=size, bytes_per_token=per_token)


class Cached:
    """A teacher who is not there: what it said of each row was written down."""

    def __init__(self, cache: Cache) -> None:
        self._cache, self.vocabulary = cache, cache.kind.vocabulary

    def look(self, inputs: dict[str, Any]) -> Callable[[slice], Sparse]:
        """What it said of a batch; tokens that are masked belong to no row."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        kind, shape = self._cache.kind, (len(ids), ids.shape[1] - 1)
        tokens = torch.zeros(*shape, kind.tokens, dtype=torch.long)
        logs = torch.full((*shape, kind.tokens), LEAST)
        shift, threshold = torch.zeros(shape), torch.full(shape, -torch.inf)
        for number, row in enumerate(ids.cpu()):
            seen = torch.arange(len(row)) if mask is None else mask[number].cpu().nonzero().flatten()
            words, place = self._cache.row(row[seen]), (number, seen[:-1])
            tokens[place], logs[place] = words.tokens, words.logs
            shift[place], threshold[place] = words.shift, words.threshold
        parts = [part.to(ids.device) for part in (tokens, logs, shift, threshold)]

        def words_of(span: slice) -> Sparse:
            tokens, logs, shift, threshold = (part[:, span].flatten(0, 1) for part in parts)
            return Sparse(tokens, logs, shift, threshold, kind.temperature, rest=not kind.drawn)

        return words_of
