"""What a run does to keep within less memory, and the passes in which a block's statistics are then gathered.

None of it changes what is computed but for the batches, whose sums round differently: they are made smaller only where
a budget was given or memory ran out. The journal says how large they were for each block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from llmshrink.forms import Event
from llmshrink.model.streamed import LOGITS

LEAST_LOGITS = LOGITS >> 4
LEAST_STATISTICS = 1 << 20


@dataclass(frozen=True)
class Economy:
    """How much is in memory at a time.

    Attributes:
        batch_tokens: Tokens of one forward pass; at least a row.
        logits: Bytes of one model's logits to ask for at a time.
        on_disk: Hidden states lie in a mapped file, which the system can take out of memory.
        statistics: Bytes of the statistics gathered in one pass over the calibration rows, at least one group's; None:
            those of the whole block.
    """

    batch_tokens: int
    logits: int = LOGITS
    on_disk: bool = False
    statistics: int | None = None

    def thriftier(self, *, row: int, statistics: int, batches: bool) -> Iterator[Economy]:
        """This economy, then others that take ever less.

        Args:
            row: tokens in a row.
            statistics: bytes of the largest block's.
            batches: whether they may be made smaller too, which changes how sums round.
        """
        now = self
        yield now
        now = replace(now, on_disk=True)
        yield now
        while batches and now.batch_tokens > row:
            tokens, logits = max(row, now.batch_tokens // 2), max(LEAST_LOGITS, now.logits // 2)
            now = replace(now, batch_tokens=tokens, logits=logits)
            yield now
        while batches and now.logits > LEAST_LOGITS:
            now = replace(now, logits=max(LEAST_LOGITS, now.logits // 2))
            yield now
        while statistics > LEAST_STATISTICS:
            statistics //= 2
            now = replace(now, statistics=statistics)
            yield now

    def told(self, what: str) -> list[Event]:
        """What is done to save memory, as an event."""
        done = ["hidden states in a file"] if self.on_disk else []
        if self.logits < LOGITS:
            done.append(f"{self.batch_tokens} tokens in a forward pass")
        if self.statistics is not None:
            done.append("statistics gathered in several passes")
        return [Event("economy", f"to {what} in the memory there is: {', '.join(done)}")] if done else []


def choose(needed: Callable[[Economy], int], economies: Iterable[Economy], limit: int) -> tuple[Economy, int]:
    """The first economy that keeps within `limit` bytes, else the last; and the bytes it needs."""
    for economy in economies:
        if (bytes_ := needed(economy)) <= limit:
            break
    return economy, bytes_


def passes(sizes: list[int], most: int | None) -> list[slice]:
    """Stretches of a list of sizes that add up to `most` at most each, or hold one only; None: a single stretch."""
    if most is None:
        return [slice(0, len(sizes))]
    found, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > most:
            found.append(slice(start, i))
            start, total = i, 0
        total += size
    return [*found, slice(start, len(sizes))]
