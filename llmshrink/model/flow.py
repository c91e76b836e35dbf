"""Where one part of a block hands channels to the next and nothing in between minds what they are: the links.

A link names, on disk, all tensors that give its channels and all that take them. What `model/families.py` says of a
family is held against what the anatomy found by structure: a matrix that gets the same tensor as one that takes the
channels must take them too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from llmshrink.model.anatomy import Block, Group
from llmshrink.model.edits import Edit, Place
from llmshrink.model.families import Family, Layout, family_of
from llmshrink.model.streamed import StreamedModel
from llmshrink.model.weights import Weights
from llmshrink.transforms.base import Change, Diagonal, LinkKind


@dataclass(frozen=True)
class Link:
    """Channels between two layers."""

    name: str  # of what gives them, in memory
    kind: LinkKind
    producers: tuple[Place, ...]
    consumers: tuple[Place, ...]
    width: int  # channels given
    size: int  # of a head; the width where there are no heads
    groups: tuple[Group, ...]  # of matrices that take them
    times: int = 1  # how often each is taken: values that several heads share

    def edits(self, change: Change) -> list[Edit]:
        """What changes its channels on both sides, so that the function stays."""
        taken = change.repeated(self.times, self.size)
        given = [place.edit(change.produced) for place in self.producers]
        return [*given, *(place.edit(taken.consumed) for place in self.consumers)]


@dataclass(frozen=True)
class BlockFlow:
    """The links of a block."""

    links: tuple[Link, ...]
    readers: tuple[Place, ...]  # of the states between blocks, behind their norms
    writers: tuple[Place, ...]  # to these states

    def of(self, kind: LinkKind) -> list[Link]:
        """The links of one kind."""
        return [link for link in self.links if link.kind == kind]


@dataclass
class Flow:
    """The links of a model."""

    blocks: tuple[BlockFlow, ...]
    final: Link | None  # from the norm behind the blocks to the head
    embedding: Place | None
    fixed: str | None  # why the states between blocks cannot be turned; None: they can
    missing: list[tuple[str, str]] = field(default_factory=list)  # what gives channels to no link, and why

    def turned(self, weights: Weights, turn: Change) -> list[Edit]:
        """What turns the states between blocks: every norm goes into what reads it, which then is turned as they are.

        `turn` is orthogonal: so the norms give what they gave, turned.
        """
        assert self.final is not None and self.embedding is not None and self.fixed is None
        found: list[Edit] = []
        for link in (*(link for block in self.blocks for link in block.of("norm")), self.final):
            norm = link.producers[0]
            stored = weights.get(norm.key)  # mapped, and so it should stay: there are many
            found += link.edits(Diagonal(stored.double() + norm.offset if norm.offset else stored))
        for block in self.blocks:
            found += [place.edit(turn.consumed) for place in block.readers]
            found += [place.edit(turn.produced) for place in block.writers]
        found += [place.edit(turn.consumed) for place in self.final.consumers]
        return [*found, self.embedding.edit(turn.produced)]


def flow_of(model: StreamedModel) -> Flow | None:
    """The links of a model, or None where its family is not known."""
    family = family_of(model.source.config)
    if family is None:
        return None
    missing: list[tuple[str, str]] = []
    finders = [_Finder(model, block, family, missing) for block in model.anatomy.blocks]
    blocks = tuple(finder.flow() for finder in finders)
    final = finders[0].final()
    table = model.anatomy.embedding
    written = all(finder.written for finder in finders)
    complete = written and all(len(flow.of("norm")) == len(family.norms) for flow in blocks)
    fixed = None if family.writers else family.fixed
    if fixed is None and model.source.config.get_text_config(decoder=True).tie_word_embeddings:
        fixed = "its head is tied to the embedding (`allow_untie: true` gives it a tensor of its own)"
    elif fixed is None and (final is None or table is None or not complete):
        fixed = (
            "; ".join(dict.fromkeys(why for _, why in missing))
            or "it has no head that reads the norm behind its blocks"
        )
    return Flow(blocks, final, None if table is None else Place(table.key, 1), fixed, missing)


class _Finder:
    """Finds the links of one block."""

    def __init__(self, model: StreamedModel, block: Block, family: Family, missing: list[tuple[str, str]]) -> None:
        self._model, self._block, self._family, self._missing = model, block, family, missing
        self._infos = model.weights.infos
        self._matrices = {m.key: m for m in block.matrices}
        self.written = True  # whether all writers are matrices

    def flow(self) -> BlockFlow:
        norms = [link for name, readers in self._family.norms.items() for link in self._norm(name, readers)]
        links = [*norms, *self._values(), *(x for p, c in self._family.products.items() for x in self._product(p, c))]
        writers = tuple(place for name in self._family.writers for place in self._writers(name))
        return BlockFlow(tuple(links), tuple(place for link in norms for place in link.consumers), writers)

    def final(self) -> Link | None:
        """From the norm behind the blocks to a head of its own."""
        head, stem = self._model.anatomy.head, self._block.prefix.rpartition(".")[0].rpartition(".")[0]
        keys = self._keys(f"{stem}.{self._family.final}" if stem else self._family.final, "weight")
        if head is None or not keys:
            return None
        producers = (Place(keys[0], 0, None, self._family.offset),)
        return Link("the last norm", "norm", producers, (Place(head.key, 1),), head.shape[1], head.shape[1], ())

    def _keys(self, name: str, leaf: str) -> tuple[str, ...]:
        """Names on disk of a module's tensor; of a parameter of that name, where there is no such module."""
        origins = self._model.map.origins
        found = origins.get(f"{name}.{leaf}") or (origins.get(name) if leaf == "weight" else None)
        return found.keys if found else ()

    def _inside(self, name: str, leaf: str = "weight") -> tuple[str, ...]:
        return self._keys(f"{self._block.prefix}.{name}", leaf)

    def _side(self, key: str, side: Literal["out", "in"]) -> int:
        """The dimension of a weight that is its outputs, or its inputs."""
        matrix = self._matrices.get(key)
        return int((side == "in") != (matrix is not None and matrix.transposed))

    def _norm(self, name: str, readers: tuple[str, ...]) -> Iterator[Link]:
        weight = self._inside(name)
        if not weight:
            self._left(name, "it has no weights")
            return
        parts = (*weight, *self._inside(name, "bias"))
        producers = tuple(Place(key, 0, None, self._family.offset if key in weight else 0.0) for key in parts)
        keys = tuple(key for reader in readers for key in self._inside(reader))
        yield from self._link(name, "norm", producers, keys, self._infos[weight[0]].shape[0])

    def _values(self) -> Iterator[Link]:
        config = self._model.source.config.get_text_config(decoder=True)
        producer, consumer = self._family.values
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        if not (keys := self._inside(producer)):
            return
        total = self._infos[keys[0]].shape[self._side(keys[0], "out")]
        rows = _value_rows(self._family.layout, total, heads, size)
        places = self._rows_of(producer, keys, rows)
        width = total if rows is None else len(rows)
        yield from self._link(producer, "values", places, self._inside(consumer), width, heads * size // width, size)

    def _rows_of(self, name: str, keys: tuple[str, ...], channels: tuple[int, ...] | None) -> tuple[Place, ...]:
        """Outputs of a linear, with its bias."""
        biases = [Place(key, 0, channels) for key in self._inside(name, "bias")]
        return (*(Place(key, self._side(key, "out"), channels) for key in keys), *biases)

    def _product(self, producer: str, consumer: str) -> Iterator[Link]:
        ups, downs = self._inside(producer), self._inside(consumer)
        if not ups or not downs:
            return
        if len(downs) > 1:  # of experts, each by itself
            ups = tuple(key for key in ups if f".{self._family.up}." in key)
            if len(ups) != len(downs):
                self._left(producer, "its experts are not called as expected")
                return
            for up, down in zip(ups, downs, strict=True):
                width = self._infos[up].shape[0]
                yield from self._link(up.removesuffix(".weight"), "product", (Place(up, 0),), (down,), width)
            return
        total = self._infos[ups[0]].shape[self._side(ups[0], "out")]
        rows = tuple(range(total // 2, total)) if self._family.halves else None
        width = total // 2 if rows else total
        yield from self._link(producer, "product", self._rows_of(producer, ups, rows), downs, width)

    def _link(
        self,
        name: str,
        kind: LinkKind,
        producers: tuple[Place, ...],
        keys: tuple[str, ...],
        width: int,
        times: int = 1,
        size: int | None = None,
    ) -> Iterator[Link]:
        """The link, where everything that takes its channels can be changed."""
        groups = tuple(group for group in self._block.groups if any(m.key in keys for m in group.matrices))
        others = [m.name for group in groups for m in group.matrices if m.key not in keys]
        together = [group for group in groups if group.sites[0].expert is None]
        consumers = tuple(Place(key, self._side(key, "in")) for key in keys)
        given = [key for key in (*keys, *(p.key for p in producers)) if len(self._infos[key].shape) > 2]
        if given:
            self._left(name, f"{self._short(given[0])} is no matrix")
        elif others:
            self._left(name, f"{self._short(others[0])} reads it too")
        elif not keys or len(together) > 1:
            self._left(name, "nothing reads it" if not keys else "what should read it gets several tensors")
        elif any(self._infos[place.key].shape[place.axis] != width * times for place in consumers):
            self._left(name, f"{self._short(keys[0])} has another width")
        else:
            yield Link(self._full(name), kind, producers, consumers, width, size or width, groups, times)

    def _full(self, name: str) -> str:
        return name if name.startswith(self._block.prefix) else f"{self._block.prefix}.{name}"

    def _short(self, key: str) -> str:
        """A name on disk without the block's number, so that all blocks are told of at once."""
        return key.rpartition(f".{self._block.index}.")[2]

    def _left(self, name: str, why: str) -> None:
        self._missing.append((self._full(name), why))

    def _writers(self, name: str) -> Iterator[Place]:
        for key in self._inside(name):
            if len(self._infos[key].shape) != 2:
                self.written = False
                self._left(name, f"{name} is no matrix")
            yield Place(key, self._side(key, "out"))
        for key in self._inside(name, "bias"):
            yield Place(key, 0)


@cache
def _value_rows(layout: Layout, total: int, heads: int, size: int) -> tuple[int, ...] | None:
    """Those of `total` outputs that are values of heads of this size, the first head's first; None: all."""
    if layout == "own":
        return None
    groups = (total // size - heads) // 2  # of queries that share their keys and values
    if layout == "last":
        return tuple(range(total - groups * size, total))
    each = total // groups
    return tuple(row for group in range(groups) for row in range((group + 1) * each - size, (group + 1) * each))
