"""One part after another: gather, compress, write, journal, go on with the compressed weights.

An embedding that is compressed comes first, as the inputs of all blocks depend on it; then the blocks; then whatever
is left, with the head among it, which sees what leaves the last block.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmshrink.engine.gather import gather, gather_head, gather_tied
from llmshrink.engine.groups import GroupCompressor, Made
from llmshrink.engine.hidden import Hidden, save_states
from llmshrink.engine.reconstruct import reconstruct
from llmshrink.engine.repair import repair, repair_head
from llmshrink.engine.shards import Shards
from llmshrink.engine.slopes import slopes_of
from llmshrink.engine.transform import Transformer
from llmshrink.engine.tuning import Tuning
from llmshrink.engine.workspace import Workspace
from llmshrink.errors import InputError
from llmshrink.forms import Event, relative_error
from llmshrink.io import safetensors
from llmshrink.memory import memory_error, release, trim
from llmshrink.model.anatomy import Block, Group, Part
from llmshrink.model.streamed import Decoded
from llmshrink.plan.economy import Economy, passes
from llmshrink.plan.work import Work
from llmshrink.progress import Progress
from llmshrink.report.schema import BlockReport, LayerReport, PackReport, TransformReport, TuneReport
from llmshrink.statistics import Gathered, NoStatistic, Statistic

FP16_MAX = torch.finfo(torch.float16).max
NEAR = 0.25  # of it: another text may well give activations four times as large
SAVE_EVERY = 60.0  # seconds between two savings of the hidden states: a run that goes on repeats at most their forwards


@dataclass
class Result:
    """What became of the blocks."""

    layers: list[LayerReport] = field(default_factory=list)
    blocks: list[BlockReport] = field(default_factory=list)
    transforms: list[TransformReport] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # tensor file -> SHA-256
    resumed: int = 0  # blocks that an earlier run had finished
    tuned: TuneReport | None = None
    packed: PackReport | None = None
    replaced: dict[str, Tensor] = field(default_factory=dict)  # tensors that were tuned, in place of a shard's

    def add(self, entry: dict[str, Any]) -> None:
        """Take over a journal entry."""
        self.layers += [LayerReport.model_validate(layer) for layer in entry["layers"]]
        self.blocks += [BlockReport.model_validate(block) for block in entry.get("reconstructed", [])]
        self.transforms += [TransformReport.model_validate(found) for found in entry.get("transformed", [])]
        self.events += [Event(**event) for event in entry["events"]]
        self.files |= entry["files"]
        for step, seconds in entry["seconds"].items():
            self.seconds[step] = self.seconds.get(step, 0.0) + seconds


class Compressor:
    """Carries out a plan on all parts."""

    def __init__(
        self,
        work: Work,
        workspace: Workspace,
        embed: Callable[[], Hidden],
        *,
        transformer: Transformer | None,
        economy: Economy,
        subset: bool,
        seed: int,
        progress: Progress,
    ) -> None:
        """Begin with a plan.

        Args:
            work: the plan.
            workspace: where it is carried out.
            embed: gives the states of the calibration rows and the probe's as they enter the first block.
            transformer: changes blocks before they are compressed; None: they stay.
            economy: how much is in memory at a time.
            subset: later layers of a block see what became of the earlier ones.
            seed: decides in which order a reconstruction sees the rows.
            progress: told of the steps.
        """
        self._work, self._model, self._workspace, self._embed = work, work.model, workspace, embed
        self._hidden: Hidden
        self._groups, self._transformer = GroupCompressor(work), transformer
        self._folder = workspace.work if work.apart else workspace.folder
        self._shards = Shards(work, self._groups, self._folder)
        self._saved = time.perf_counter()  # when states last were
        self._economy, self._batch_tokens, self._statistics = economy, economy.batch_tokens, economy.statistics
        self._subset, self._seed, self._progress = subset, seed, progress
        self._pending: Future[dict[str, Any]] | None = None
        self._unwritten: list[Event] = []  # go into the journal with the next block

    def run(self, done: list[dict[str, Any]]) -> tuple[Result, Tensor]:
        """Compress every part that `done`, the journal's entries, does not hold yet; then tune them all.

        Returns:
            What became of the parts, and the states [rows, length, hidden] of the probe rows behind the last block.
        """
        result = Result()
        tuning, done = [e for e in done if "tuning" in e], [e for e in done if "tuning" not in e]
        if self._transformer is not None:
            self._transformer.begin([entry["block"] for entry in done if entry.get("transformed")])
        for entry in done:
            self._add(result, entry)
        parts = self._work.parts
        result.resumed = sum(isinstance(part, Block) for part in parts[: len(done)])
        sizes = [sum(m.numel for m in part.matrices) for part in parts]
        self._progress.start("compress", sum(sizes), sum(sizes[: len(done)]))
        todo = parts[len(done) :]
        with ThreadPoolExecutor(1) as disk:
            for part in (part for part in todo if part.index < 0):
                self._do(part, result, disk)
            self._written_out(result)
            self._begin(done, result)
            for part in (part for part in todo if part.index >= 0):
                self._do(part, result, disk)
            self._written_out(result)
        self._tell(self._unwritten, result)  # where no block was left to do
        self._progress.finish()
        if self._work.tune is not None:
            self._tune(tuning, result)
        return result, self._hidden.states[-1]

    def _tune(self, done: list[dict[str, Any]], result: Result) -> None:
        """Tune all parts together, and take the probe through them as they are then."""
        tuning = Tuning(
            self._work,
            self._workspace,
            self._shards,
            self._hidden,
            economy=self._economy,
            seed=self._seed,
            progress=self._progress,
        )
        entry = tuning.run(done)
        result.tuned = TuneReport.model_validate(entry["report"])
        self._add(result, {**entry, "layers": [], "files": {}})
        for path in (self._workspace.folder / name for name in entry["files"]):
            changed = safetensors.Checkpoint(path.parent, safetensors.read_header(path))
            result.replaced = {name: changed.get(name) for name in changed.infos}
        self._shards.replaced = result.replaced
        self._hidden = self._hidden.anew()
        layers = {layer.name: layer for layer in result.layers}
        for block in self._model.anatomy.blocks:
            decoded = self._shards.written(block)
            for matrix in block.matrices:
                if matrix in self._work.scale_shapes and result.replaced:
                    error = relative_error(self._model.read(matrix), decoded[matrix.key].weight())
                    changes = {"relative_error": error, "objective": None}
                    layers[matrix.name] = layers[matrix.name].model_copy(update=changes)
            largest = self._forward(block, decoded)
            if result.replaced:
                self._tell(self._range(block, largest), result)
        result.layers = list(layers.values())

    def _do(self, part: Part, result: Result, disk: ThreadPoolExecutor) -> None:
        entry, tensors = self._block(part, result) if isinstance(part, Block) else self._outside(part)
        states = None
        if isinstance(part, Block) and time.perf_counter() - self._saved >= SAVE_EVERY:
            self._saved, states = time.perf_counter(), self._hidden.kept
        self._written_out(result)
        # Files are written and synced while the next part computes; the journal line comes last.
        self._pending = disk.submit(self._write, part, tensors, states, entry)
        if part.matrices:
            worst = max((layer["relative_error"] or 0.0 for layer in entry["layers"]), default=0.0)
            what = f"block {part.index}" if isinstance(part, Block) else part.matrices[0].name
            self._progress.advance(sum(m.numel for m in part.matrices), f"{what}: relative error up to {worst:.3f}")

    def _written_out(self, result: Result) -> None:
        """Wait until the block before this one is on disk, or fail as its writing did."""
        if self._pending is not None:
            self._add(result, self._pending.result())
        self._pending = None

    def _tell(self, events: list[Event], result: Result) -> None:
        """Tell of events that no entry of the journal has."""
        for event in events:
            result.events.append(event)
            self._progress.event(event)

    def _add(self, result: Result, entry: dict[str, Any]) -> None:
        """Take over an entry, and tell what happened in it."""
        known = len(result.events)
        result.add(entry)
        for event in result.events[known:]:
            self._progress.event(event)

    def _begin(self, done: list[dict[str, Any]], result: Result) -> None:
        """Embed all rows, as the written embedding does, and go on behind the last finished block."""
        model, embedding = self._model, self._model.anatomy.embedding
        if embedding is not None and embedding in self._work.methods:
            checkpoint, slot = self._shards.open(self._work.parts[0]), self._work.slots[embedding]
            model.replace(embedding, self._work.format.reader(slot, checkpoint.get, self._work.quantization_config))
        elif embedding is not None and embedding.key in model.weights.compressed:
            stored, dtype = model.weights.rows(embedding.key), model.weights.infos[embedding.key].dtype
            model.replace(embedding, lambda rows: stored(rows).to(dtype))  # it is written dense
        self._hidden, self._saved = self._embed(), time.perf_counter()
        if self._transformer is not None:
            self._transformer.prove_ends(self._hidden)
        self._restore([entry for entry in done if "batches" in entry], result)

    def _restore(self, done: list[dict[str, Any]], result: Result) -> None:
        """Bring back the states behind the last finished block; `done` holds the entries of blocks.

        They come from the newest file of them that is whole; what was compressed after it runs again on what was
        written, which gives the same bits.
        """
        blocks = self._model.anatomy.blocks
        newest = self._newest_states(done, result)
        for entry in done:
            self._hidden.split(entry["batches"])  # as it was done: sums of other batches round differently
            block = blocks[entry["block"]]
            if entry is newest:
                self._hidden.load(self._workspace.folder / next(iter(entry["states"])))
            elif newest is None or block.index > newest["block"]:
                self._progress.advance(0, f"running block {block.index} again")
                self._advance_originals(block)
                self._forward(block, self._shards.written(block))
        rows = self._hidden.within(self._batch_tokens)
        if rows != self._hidden.rows:  # there is less memory than when the run began
            self._hidden.split(rows)
            message = f"going on after {len(done)} blocks with {self._batch_tokens} tokens in a forward pass"
            self._unwritten.append(Event("smaller_batches", message))

    def _newest_states(self, done: list[dict[str, Any]], result: Result) -> dict[str, Any] | None:
        """The last entry whose file of states is whole; told, where a later one is not."""
        saved = [entry for entry in done if "states" in entry]
        whole = next((entry for entry in reversed(saved) if self._workspace.holds(entry["states"])), None)
        told = bool(self._workspace.events)  # where a block was lost, so were its states
        if saved and whole is not saved[-1] and not told:
            path = self._workspace.folder / next(iter(saved[-1]["states"]))
            message = f"{path} is damaged or gone: the forward passes since the last whole one are run again"
            self._tell([Event("work_lost", message)], result)
        return whole

    # --- one part

    def _outside(self, part: Part) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A part that is no block: the head from what leaves the last block, the embedding from weights alone.

        An embedding that is the head too is compressed for what leaves the original's last block.
        """
        clock, made = _Clock(), self._begun(part)
        statistics: dict[Group, Gathered] = {}
        for group in part.groups:
            kinds = self._work.needs(group)
            if self._work.statistic_bytes(group) and part.index < 0:
                statistics[group] = gather_tied(self._model, group, kinds, self._embed())
            elif self._work.statistic_bytes(group):
                statistics[group] = gather_head(self._model, group, kinds, self._hidden)
            else:
                statistics[group] = {kind: kind(group.width, self._model.device) for kind in kinds}
        clock.lap("calibrate")
        for found in self._groups.compress(list(part.groups), statistics):
            made.add(found)
        clock.lap("compress")
        head = self._model.anatomy.head
        if self._work.repair is not None and part.index > 0 and head in self._work.repair.matrices:
            repair_head(head, made, self._hidden, self._groups, self._work.repair)
            clock.lap("repair")
        return _entry(part, made, clock), made.tensors

    def _block(self, block: Block, result: Result) -> tuple[dict[str, Any], dict[str, Tensor]]:
        clock, events = _Clock(), self._unwritten
        self._unwritten = []
        transformed = self._transformed(block, events)
        if transformed:
            clock.lap("transform")
        made = self._begun(block)
        made.decoded, made.events = self._shards.opened(block), events
        for step in self._steps(block):
            before = dict(made.decoded)  # what is compressed in a step is seen by the next one only
            sizes = [self._work.statistic_bytes(group) for group in step]
            for groups in (step[part] for part in passes(sizes, self._statistics)):
                kinds = {group: self._work.needs(group) for group in groups}
                statistics = self._gather(block, groups, kinds, before, made.events)
                clock.lap("calibrate")
                for found in self._groups.compress(groups, statistics):
                    made.add(found)
                    trim()
                clock.lap("compress")
        batches = self._hidden.rows
        self._written_out(result)  # perhaps with the states, which change now
        clock.lap("wait")
        learned: list[BlockReport] = []
        self._advance_originals(block)
        off = None
        if self._work.repair is not None:
            off = repair(block, made, self._hidden, self._groups, self._work.repair)
            trim()
            clock.lap("repair")
        if self._work.reconstruct is not None:
            learned = reconstruct(block, made, self._hidden, self._groups, self._work.reconstruct, self._seed)
            trim()
            clock.lap("reconstruct")
        made.events += self._range(block, self._forward(block, made.decoded))
        if off is not None:
            learned = [BlockReport(block=block.index, error_before=off, error_after=self._hidden.off())]
        clock.lap("forward")
        told = [found.model_dump(mode="json") for found in learned]
        entry = {**_entry(block, made, clock), "batches": batches, "reconstructed": told}
        return {**entry, **transformed}, made.tensors

    def _transformed(self, block: Block, events: list[Event]) -> dict[str, Any]:
        """Make the changes of a block before it is compressed; what the journal says of them."""
        if self._transformer is None:
            return {}

        def find(groups: list[Group], kinds: tuple[type[Statistic], ...]) -> dict[Group, Gathered]:
            return self._gather(block, groups, dict.fromkeys(groups, kinds), self._shards.opened(block), events)

        reports, files = self._transformer.block(block, self._hidden, find, events)
        written = {self._workspace.below(path): digest for path, digest in files.items()}
        return {"transformed": [report.model_dump(mode="json") for report in reports], "files": written}

    def _advance_originals(self, block: Block) -> None:
        """Take the original's states through its block."""
        if self._hidden.originals:
            self._hidden.advance_originals(block.index)

    def _begun(self, part: Part) -> Made:
        """A part before any of its matrices is compressed: all other tensors."""
        compressed = {m.key for m in part.matrices if m in self._work.methods}
        return Made(tensors={key: self._model.weights.dense(key) for key in part.keys if key not in compressed})

    def _forward(self, block: Block, decoded: dict[str, Decoded]) -> float:
        """Take all states through a compressed block; the largest magnitude that comes out."""
        head, last = self._model.anatomy.head, block is self._model.anatomy.blocks[-1]
        learns = self._work.tune is not None or self._work.repair is not None  # or looks at where they end
        needed = learns or (head is not None and self._work.reads_data(head))
        if last and not needed:
            self._hidden.forget()  # nothing follows that calibration rows could calibrate
        self._model.load_block(block.index, decoded)
        largest = self._hidden.advance(block.index)
        self._model.drop_block(block.index)
        trim()
        return largest

    def _range(self, block: Block, largest: float) -> list[Event]:
        """What to tell of a block whose outputs come near the end of float16, where loaders compute in that dtype.

        Raises:
            InputError: they lie beyond it. Here it is not seen, because a CPU computes in float32.
        """
        if self._model.source.config.dtype != torch.float16 or largest <= NEAR * FP16_MAX:
            return []
        message = f"block {block.index} gives activations up to {largest:.0f}, and float16 ends at {FP16_MAX:.0f}"
        if largest > FP16_MAX:
            raise InputError(
                f"{self._model.source.id}: {message}: computed in the checkpoint's dtype they are infinite.",
                hint="Give the model in bfloat16 or float32: convert its weights, and `dtype` in config.json.",
            )
        return [Event("near_fp16_limit", message, block.prefix, {"block": float(block.index), "largest": largest})]

    def _steps(self, block: Block) -> Iterator[list[Group]]:
        """Groups that are calibrated together: all, or one stretch of the forward pass after another."""
        groups = [g for g in block.groups if any(m in self._work.methods for m in g.matrices)]
        if not self._subset:
            if groups:
                yield groups
            return
        # All experts' first matrices belong to one stretch, their second matrices to the next.
        groups.sort(key=lambda g: next(i for i, h in enumerate(block.groups) if _stretch(h) == _stretch(g)))
        for _, members in groupby(groups, key=_stretch):
            yield list(members)

    def _gather(
        self,
        block: Block,
        groups: list[Group],
        kinds: dict[Group, tuple[type[Statistic], ...]],
        decoded: dict[str, Decoded],
        events: list[Event],
    ) -> dict[Group, Gathered]:
        """Statistics of the groups; the block is in memory only for this, not while matrices are compressed.

        Where memory runs out it is tried again: once as it was, then with ever smaller batches.
        """
        if all(found == (NoStatistic,) for found in kinds.values()):
            return {g: {NoStatistic: NoStatistic(g.width, self._model.device)} for g in groups}
        for attempt in itertools.count():
            try:
                self._model.load_block(block.index, decoded)
                slopes = slopes_of(self._work, block, self._workspace.work)
                return gather(self._model, block, groups, kinds, self._hidden, slopes)
            except (MemoryError, RuntimeError) as error:
                if not memory_error(error) or (attempt and not self._hidden.most_tokens()):
                    raise
            finally:
                self._model.drop_block(block.index)
                trim()
            release(self._model.device)
            kind, what = "out_of_memory", "tried again"
            if attempt:
                tokens = self._hidden.most_tokens() // 2
                self._hidden.split(self._hidden.within(tokens))
                kind, what = "smaller_batches", f"going on with {tokens} tokens in a forward pass"
            events.append(Event(kind, f"memory ran out while block {block.index} was calibrated: {what}"))
        raise AssertionError("count() does not end")

    # --- files

    def _write(
        self, part: Part, tensors: dict[str, Tensor], states: list[Tensor] | None, entry: dict[str, Any]
    ) -> dict[str, Any]:
        start = time.perf_counter()
        path = self._folder / self._work.shards[part.index]
        entry = {
            **entry,
            "files": {**entry.get("files", {}), self._workspace.below(path): safetensors.write(path, tensors)},
        }
        older: list[Path] = []
        if states:
            path = self._workspace.work / _hidden_name(f"{part.index:05d}")
            older = [found for found in self._workspace.work.glob(_hidden_name("*")) if found != path]
            entry["states"] = {self._workspace.below(path): save_states(path, states)}
        entry["seconds"]["write"] = time.perf_counter() - start
        self._workspace.append(entry)
        for path in older:
            path.unlink()
        return entry


def _entry(part: Part, made: Made, clock: _Clock) -> dict[str, Any]:
    """What the journal says of a part, but for its files."""
    order = {m.name: i for i, m in enumerate(part.matrices)}
    layers = sorted(made.layers, key=lambda layer: order[layer.name])
    return {
        "block": part.index,
        "layers": [layer.model_dump(mode="json") for layer in layers],
        "events": [vars(event) for event in made.events],
        "seconds": clock.seconds,
    }


def _hidden_name(index: str) -> str:
    """The file of the states behind a block."""
    return f"hidden-{index}.safetensors"


def _stretch(group: Group) -> tuple[str, str]:
    return group.sites[0].module, group.sites[0].leaf


class _Clock:
    """Seconds by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, step: str) -> None:
        now = time.perf_counter()
        self.seconds[step] = self.seconds.get(step, 0.0) + now - self._last
        self._last = now
