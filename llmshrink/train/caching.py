"""What a teacher says of rows, written down once: shard by shard, and on from the last whole one after a kill."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from shutil import disk_usage
from typing import Any

import torch
from filelock import AcquireReturnProxy, FileLock, Timeout
from torch import Tensor

from llmshrink.calibration.rows import Rows
from llmshrink.errors import InputError, OutputError, ResourceError
from llmshrink.evaluate.texts import last_states
from llmshrink.io import safetensors
from llmshrink.io.files import disk_faults, has_hash, nearest, sealed, unsealed, write_bytes, write_json
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.cache import FACTS, SHARD, Keeping, Kind
from llmshrink.plan.steps import LOGITS
from llmshrink.progress import Progress
from llmshrink.train.cache import Cache, key_of, packed
from llmshrink.train.data import Examples
from llmshrink.train.folders import CACHE
from llmshrink.train.sparse import Sparse, drawn, likeliest

COPIES = 8  # of a stretch of logits while tokens are chosen, in float32
BEGUN = "cache.begun"  # in the folder of work
JOURNAL, LOCK = "journal", ".lock"
WAIT = 1.0  # seconds between two looks whether another run is done


def cache_of(keeping: Keeping, examples: Examples, work: Path, device: torch.device, progress: Progress) -> Cache:
    """The cache that a student learns from: the one that is there, or made now.

    Args:
        keeping: says which.
        examples: to learn from.
        work: the run's folder of work.
        device: where the teacher is computed.
        progress: told of the tokens that went through each of its blocks.

    Raises:
        InputError: the cache is damaged, another teacher's, or has not these rows.
        OutputError: something else lies in its place.
        ResourceError: there is no room for it.
    """
    folder, teacher = keeping.folder or work / CACHE, keeping.teacher
    if teacher is not None and not (folder / FACTS).is_file():
        with disk_faults(folder, check_room(keeping, examples, work)):
            _make(StreamedModel(teacher, device), keeping.facts(examples.told.fingerprint), examples, folder, progress)
    cache = Cache(folder)
    if cache.kind != keeping.kind:
        raise InputError(
            f"Another run has made another cache in {folder} meanwhile.", hint="Name another cache.folder."
        )
    if teacher is not None and cache.facts["teacher_files"] != teacher.hashes:
        raise InputError(
            f"{folder} holds the words of another teacher, {cache.facts['teacher']}: its files are not those of "
            f"{teacher.id}.",
            hint="Name that teacher, or another cache.folder.",
        )
    cache.check(map(examples.ids, range(len(examples))))
    _check_same(cache, folder, work)
    return cache


def _check_same(cache: Cache, folder: Path, work: Path) -> None:
    """Refuse to go on with a run that began with another cache."""
    begun, now = work / BEGUN, sealed(cache.facts["shards"])
    if begun.is_file() and begun.read_bytes() != now:
        raise InputError(
            f"{folder} is no longer the cache that this run began with.",
            hint="Put that one back, or give --no-resume to start anew.",
        )
    write_bytes(begun, now)


def check_room(keeping: Keeping, examples: Examples, work: Path) -> int:
    """Refuse what has no room; returns the bytes of the whole. What a plan says is a bound: it has not read the text.

    Raises:
        ResourceError: there is none.
    """
    folder = keeping.folder or work / CACHE
    made = (folder / FACTS).is_file()
    needed = 0 if made else keeping.kind.bytes(len(examples), examples.count - len(examples))
    free = disk_usage(nearest(folder)).free + sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if needed > free:
        raise ResourceError(
            f"The cache {folder} needs {needed / 2**20:.1f} MiB of disk, and {free / 2**20:.1f} are free.",
            hint="Keep fewer tokens of a position (cache.tokens), or name a cache.folder on another disk.",
        )
    return needed


def _make(teacher: StreamedModel, facts: dict[str, Any], examples: Examples, folder: Path, progress: Progress) -> None:
    """Make a cache, or wait for the run that makes it."""
    if folder.exists() and any(folder.iterdir()) and not (folder / LOCK).exists():
        raise OutputError(f"{folder} is there already, and it is no cache.", hint="Name another cache.folder.")
    folder.mkdir(parents=True, exist_ok=True)
    progress.start("cache", examples.count * len(teacher.anatomy.blocks))
    with _acquired(folder, progress):
        if not (folder / FACTS).is_file():
            _Making(teacher, facts, folder, progress).run(examples)
    progress.finish()


def _acquired(folder: Path, progress: Progress) -> AcquireReturnProxy[Any]:
    lock = FileLock(folder / LOCK)
    while True:
        try:
            return lock.acquire(timeout=WAIT)
        except Timeout:
            progress.advance(0, f"another run makes {folder.name}")  # a signal ends the waiting


class _Making:
    def __init__(self, teacher: StreamedModel, facts: dict[str, Any], folder: Path, progress: Progress) -> None:
        self._teacher, self._facts, self._folder, self._progress = teacher, facts, folder, progress
        self._kind = Kind(**facts["kind"])

    def run(self, examples: Examples) -> None:
        """Make what is not there yet."""
        parts, blocks = examples.parted(SHARD), len(self._teacher.anatomy.blocks)
        shards = self._held()
        done = blocks * sum(shard["rows"] + shard["positions"] for shard in shards)
        write_bytes(self._folder / JOURNAL, b"".join(sealed(line) + b"\n" for line in [self._facts, *shards]))
        self._progress.start("cache", examples.count * blocks, done)
        for number, part in enumerate(parts[len(shards) :], len(shards)):
            shards.append(self._shard(number, examples.rows(part)))
            self._append(shards[-1])
            self._progress.advance(0, f"shard {number + 1} of {len(parts)}")
        positions = sum(shard["positions"] for shard in shards)
        covered = sum(shard.pop("covered") for shard in shards) / positions
        told = {
            "rows": len(examples),
            "positions": positions,
            "covered": covered,
            "seconds": sum(shard.pop("seconds") for shard in shards),
            "shards": shards,
        }
        write_json(self._folder / FACTS, {**self._facts, **told})
        (self._folder / JOURNAL).unlink(missing_ok=True)

    def _held(self) -> list[dict[str, Any]]:
        """Shards that an earlier run made, up to the first that is not whole.

        Raises:
            OutputError: they are of another cache.
        """
        path = self._folder / JOURNAL
        lines = path.read_bytes().removesuffix(b"\n").split(b"\n") if path.is_file() else []
        first, *others = map(unsealed, lines) if lines else [None]
        if first is not None and first != self._facts:
            wrong = ", ".join(sorted(key for key in self._facts if first.get(key) != self._facts[key]))
            raise OutputError(
                f"{self._folder} holds an unfinished cache of another {wrong}.",
                hint="Give that recipe again, remove the folder, or name another cache.folder.",
            )
        whole = takewhile(lambda s: s is not None and has_hash(self._folder / s["file"], s["sha256"]), others)
        return list(whole) if first is not None else []

    def _append(self, shard: dict[str, Any]) -> None:
        with (self._folder / JOURNAL).open("ab") as file:
            file.write(sealed(shard) + b"\n")

    def _shard(self, number: int, rows: Rows) -> dict[str, Any]:
        clock, name = time.perf_counter(), f"{number:05d}.safetensors"
        batches = rows.batches(self._teacher.batch_tokens(None))
        ends = last_states(self._teacher, batches, None, self._progress)
        found = [words for tokens, end in zip(batches, ends, strict=True) for words in self._words(tokens, end)]
        words = _joined(found)
        dither = torch.cat([self._random(row)[:, 1:] for row in rows.tokens]).float()
        tensors = packed(words, self._kind, dither)
        tensors["rows"] = torch.tensor([list(key_of(row)) for row in rows.tokens], dtype=torch.uint8)
        tensors["positions"] = torch.tensor([len(row) - 1 for row in rows.tokens], dtype=torch.int32)
        return {
            "file": name,
            "sha256": safetensors.write(self._folder / name, tensors),
            "rows": len(rows.tokens),
            "positions": len(words.tokens),
            "covered": float(words.at(words.temperature)[0].exp().sum()),
            "seconds": time.perf_counter() - clock,
        }

    @torch.no_grad()
    def _words(self, tokens: Tensor, end: Tensor) -> Iterator[Sparse]:
        """Of a batch, row by row, a stretch of positions at a time."""
        stretch = max(1, LOGITS // (self._kind.vocabulary * 4 * COPIES))
        for row, state in zip(tokens[:, None], end[:, None], strict=True):
            uniform = self._random(row[0])[:, 0]
            for start in range(0, len(uniform), stretch):
                part = slice(start, min(start + stretch, len(uniform)))
                logits = self._teacher.output(row[:, part], state[:, part])[0, :, : self._kind.vocabulary]
                yield self._chosen(logits, uniform[part])

    def _chosen(self, logits: Tensor, uniform: Tensor) -> Sparse:
        kind = self._kind
        if not kind.drawn:
            return likeliest(logits, kind.tokens, kind.temperature)
        return drawn(logits, kind.tokens, kind.temperature, uniform.to(logits.device))

    def _random(self, row: Tensor) -> Tensor:
        """Numbers for each position of a row but its last [positions, 1 + k]: the same in any shard and any run."""
        seed = int.from_bytes(key_of(row)[:7], "little") + int(self._facts["seed"])
        shape = len(row) - 1, 1 + self._kind.tokens
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _joined(found: list[Sparse]) -> Sparse:
    names = ("tokens", "logs", "shift", "threshold")
    parts = {name: torch.cat([getattr(words, name).cpu() for words in found]) for name in names}
    return Sparse(**parts, temperature=found[0].temperature, rest=found[0].rest)
