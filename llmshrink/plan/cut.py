"""From what is to be kept of a model to the smaller sizes that this can be, and the work of writing any of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from llmshrink.errors import InputError, PlanError
from llmshrink.formats import load_format
from llmshrink.forms import Event
from llmshrink.methods.base import Method
from llmshrink.methods.cut import Cut as Left
from llmshrink.methods.cut import CutConfig
from llmshrink.model.anatomy import Matrix
from llmshrink.model.streamed import StreamedModel
from llmshrink.model.surgery import Cut, Original, Surgery
from llmshrink.model.widths import Chosen, Width, all_of, operate, other_constant, width_if_any, width_of
from llmshrink.plan.layout import default_output, lay_out
from llmshrink.plan.work import Repair, Work
from llmshrink.recipe.cut import WIDTHS, CutSpec
from llmshrink.recipe.schema import Recipe
from llmshrink.recipe.stages import CutStage

STEPS = (256, 128, 64, 32, 16, 8, 4, 2, 1)  # what widths are multiples of: runtimes like large ones
FEWEST = 32  # steps in a width: fewer would leave little to choose
LEAST = 0.25  # of a width, and of the layers, that a target leaves
MOST = 12  # candidates that are tried for a target
FEW = 8  # numbers that are listed one by one
ENTRY = 120  # bytes of a header for a tensor, at most, beside its name


@dataclass(frozen=True)
class Shape:
    """How much is kept of everything.

    Attributes:
        counts: Of each width that is cut, its things.
        layers: How many.
        named: Or which; None: it is to be found out.
    """

    counts: Mapping[str, int] = field(default_factory=dict)
    layers: int = 0
    named: tuple[int, ...] | None = None


class Cuts:
    """All that a stage leaves open of what becomes of a model.

    Attributes:
        spec: What the recipe says.
        model: The whole model.
        widths: That are cut, by their names.
        shapes: Of which one is chosen by measuring; one, where the recipe says it all.
    """

    def __init__(self, recipe: Recipe, stage: CutStage, model: StreamedModel) -> None:
        """Find what can be cut.

        Raises:
            PlanError: something cannot be, or the target cannot be met.
        """
        self.spec: CutSpec = stage.cut
        self._stage = stage
        self.model, self._recipe = model, recipe
        if model.weights.compressed or model.source.gguf:
            raise PlanError(
                f"{model.source.id} is stored as {model.weights.format.name}: tensors of codes cannot be cut.",
                hint="`llmshrink export --to dense` writes it without codes; cut that, and quantize the result.",
            )
        if self.spec.criterion == "taylor" and not model.task.causal:
            raise PlanError(
                f"{type(model.model).__name__}: there is no next token whose loss the criterion taylor could look at.",
                hint="obs, wanda, activation, fluctuation and magnitude need none.",
            )
        self.layers = len(model.anatomy.blocks)
        asked = [name for name in WIDTHS if getattr(self.spec, name) is not None]
        self.widths = {name: width_of(model, name) for name in asked}
        if self.spec.aimed:
            self._add_free_widths()
        for name in self.widths.keys() - {"hidden"}:
            self._refuse_several(name)
        self.shapes = list(self._aimed()) if self.spec.aimed else [self._said()]
        if len(self.shapes) == 1 and self._whole(self.shapes[0]):
            raise PlanError("All of the model is kept as the recipe says it: nothing would be cut.")

    @property
    def needs_data(self) -> bool:
        """Whether what is open is measured on calibration text: all but magnitudes, and layers that are named."""
        by_text = self.widths.keys() if self.spec.criterion != "magnitude" else self.widths.keys() & {"hidden"}
        return bool(by_text) or len(self.shapes) > 1 or self.shapes[0].named is None

    def _refuse_several(self, name: str) -> None:
        """Nothing is known of what is worth most where several linears of a block read the same things."""
        for block in self.model.anatomy.blocks:
            readers = [m for m in block.matrices if (m.key, 0 if m.transposed else 1) in self.widths[name].axes]
            if len(readers) > 1:
                raise PlanError(
                    f"{type(self.model.model).__name__}: its {name} cannot be cut: several linears of a block read "
                    f"them ({readers[0].name}, {readers[1].name}).",
                    hint="--layers can be cut.",
                )

    def _whole(self, shape: Shape) -> bool:
        return shape.layers == self.layers and all(n == self.widths[w].total for w, n in shape.counts.items())

    def _add_free_widths(self) -> None:
        """Sizes that a target may make smaller: neurons or experts, and heads, where they can be."""
        for name in ("neurons", "experts", "heads"):
            if name not in self.widths and (width := width_if_any(self.model, name)) is not None:
                self.widths[name] = width

    # --- shapes

    def _said(self) -> Shape:
        """What the recipe says of each size.

        Raises:
            PlanError: it is more than there is, or does not divide.
        """
        counts = {name: self._count(name) for name in self.widths}
        layers, named = self._kept_layers()
        return Shape(counts, layers, named)

    def _count(self, name: str) -> int:
        width, amount = self.widths[name], getattr(self.spec, name)
        whole = width.total * width.each
        wanted = amount.of(whole, width.each * self._step(width))
        allowed = [count * width.each for count in width.possible]
        if amount.share is not None and allowed:
            wanted = min(allowed, key=lambda count: abs(count - wanted))
        if not 0 < wanted <= whole or (allowed and wanted not in allowed):
            possible = _in_words(allowed) if allowed else f"1 to {whole}"
            why = f" {width.each} of them share a key and a value." if wanted % width.each else ""
            if name == "experts" and wanted < allowed[0]:
                why = f" Every token is handed to {allowed[0]} of them."
            raise PlanError(f"{wanted} {name} cannot be kept of {whole}.{why}", hint=f"Possible: {possible}.")
        return int(wanted // width.each)

    def _kept_layers(self) -> tuple[int, tuple[int, ...] | None]:
        said = self.spec.layers
        if said is None:
            return self.layers, tuple(range(self.layers))
        if isinstance(said, list):
            if said[-1] >= self.layers:
                raise PlanError(f"There is no layer {said[-1]}: the model has layers 0 to {self.layers - 1}.")
            return len(said), tuple(said)
        count = said.of(self.layers)
        if count > self.layers:
            raise PlanError(f"{count} layers cannot be kept of {self.layers}.")
        return count, tuple(range(self.layers)) if count == self.layers else None

    def _step(self, width: Width) -> int:
        if width.name in ("heads", "experts"):
            return 1
        return self.spec.round_to or next((step for step in STEPS if width.total // step >= FEWEST), 1)

    def _aimed(self) -> Iterator[Shape]:
        """The shapes that meet a target from below: as deep as it was, then ever less deep, each as wide as fits.

        Raises:
            PlanError: none does.
        """
        found = list(self._fitting())
        if not found:
            least = {w: max([math.ceil(LEAST * of.total), *of.possible[:1], 1]) for w, of in self.widths.items()}
            smallest = self.weight(Shape(least, max(1, math.ceil(LEAST * self.layers))))
            unit = "parameters" if self.spec.params is not None else "bytes"
            raise PlanError(
                f"The target of {self.limit:,} {unit} cannot be met; with a quarter of every size and of the layers "
                f"there would be {smallest:,}.",
                hint="Quantize the model too, or name smaller sizes: --hidden, --layers.",
            )
        return iter(found[:MOST])

    def _fitting(self) -> Iterator[Shape]:
        said, named = self._kept_layers()
        depths = [said] if self.spec.layers is not None else range(said, max(1, math.ceil(LEAST * said)) - 1, -1)
        for depth in depths:
            known = named if depth == said else None
            for counts in self._narrower():
                if (shape := self._widest(Shape(counts, depth, known))) is not None:
                    yield shape
                    if self._fine is None or shape.counts[self._fine.name] == self._fine.total:
                        return  # shallower ones would only be smaller than asked for

    @property
    def _fine(self) -> Width | None:
        """The width that a target is met by."""
        return self.widths.get("experts") or self.widths.get("neurons")

    def _narrower(self) -> Iterator[dict[str, int]]:
        """Counts of the widths but for that one: what the recipe says, or all and one group of heads less."""
        others = [name for name, width in self.widths.items() if width is not self._fine]
        fixed = {name: self._count(name) for name in others if getattr(self.spec, name) is not None}
        fixed |= {name: self.widths[name].total for name in others if name == "neurons" and name not in fixed}
        heads = self.widths.get("heads")
        if heads is None or "heads" in fixed:
            yield fixed
            return
        for count in heads.possible[:-3:-1]:
            yield {**fixed, "heads": count}

    def _widest(self, shape: Shape) -> Shape | None:
        """The shape with as many neurons, or experts, as the target allows; None: it would need less than a quarter."""
        width = self._fine
        if width is None or getattr(self.spec, width.name) is not None:
            counts = dict(shape.counts) if width is None else {**shape.counts, width.name: self._count(width.name)}
            full = Shape(counts, shape.layers, shape.named)
            return full if self.weight(full) <= self.limit else None
        step, least = self._step(width), max([int(LEAST * width.total) + 1, *width.possible[:1]])
        options = [width.total, *range(width.total // step * step, least - 1, -step)]
        for count in dict.fromkeys(options):
            full = Shape({**shape.counts, width.name: count}, shape.layers, shape.named)
            if self.weight(full) <= self.limit:
                return full
        return None

    @cached_property
    def limit(self) -> int:
        """Parameters, or bytes of tensors, that there may be."""
        if self.spec.params is not None:
            return self.spec.params.of(self.model.parameters)
        assert self.spec.size is not None
        headers = sum(len(key) + ENTRY for key in self.model.weights.infos)
        return self.spec.size.of(self.model.source.checkpoint.file_bytes) - headers

    def weight(self, shape: Shape) -> int:
        """Parameters, or bytes of tensors, of a shape: with the first of its layers, where these are not known."""
        return self._numbers(shape, bytes_each=self.spec.params is None)

    def _numbers(self, shape: Shape, *, bytes_each: bool) -> int:
        kept = set(shape.named or range(shape.layers))
        homes = {key: block.index for block in self.model.anatomy.blocks for key in block.keys}
        total = 0
        for key, info in self.model.weights.infos.items():
            if homes.get(key, min(kept)) not in kept or (key in self.model.anatomy.unused and not bytes_each):
                continue
            sizes = list(info.shape)
            for name, count in shape.counts.items():
                width = self.widths[name]
                if width.members.get(key, 0) >= count:
                    sizes = [0]
                for axis in (axis for axis in range(len(sizes)) if (key, axis) in width.axes):
                    sizes[axis] = sizes[axis] // width.total * count
            total += math.prod(sizes) * (info.dtype.itemsize if bytes_each else 1)
        return total

    def sizes(self, shape: Shape | None = None) -> dict[str, int]:
        """How many there are of everything that is cut, in the user's numbers; None: of the whole model."""
        widths = {
            name: (width.total if shape is None else shape.counts[name]) * width.each
            for name, width in self.widths.items()
        }
        return {**widths, "layers": self.layers if shape is None else shape.layers}

    def sizes_of(self, chosen: Chosen) -> dict[str, int]:
        """The same of what was chosen."""
        return self.sizes(self._shape_of(chosen))

    def fits(self, chosen: Chosen) -> bool:
        """Whether what was chosen meets the target, if there is one."""
        return not self.spec.aimed or self.weight(self._shape_of(chosen)) <= self.limit

    def parameters(self, chosen: Chosen) -> int:
        """Weights of what was chosen."""
        return self._numbers(self._shape_of(chosen), bytes_each=False)

    def _shape_of(self, chosen: Chosen) -> Shape:
        counts = {name: len(found[0]) for name, found in chosen.inside.items()}
        if chosen.channels is not None:
            counts["hidden"] = len(chosen.channels)
        return Shape(counts, len(chosen.blocks), chosen.blocks)

    # --- work

    def first(self, shape: Shape) -> Chosen:
        """A choice of this shape before anything was measured."""
        chosen = all_of(self.model, self.widths.values(), shape.counts, shape.layers)
        return chosen if shape.named is None else Chosen(shape.named, chosen.inside, chosen.channels)

    def work(self, chosen: Chosen) -> Work:
        """The work of writing what was chosen.

        Raises:
            PlanError: the family's configuration cannot say it.
        """
        source, widths = self.model.source, list(self.widths.values())
        surgery = operate(self.model, widths, chosen)
        try:
            small = StreamedModel(Cut.of(source, surgery), self.model.device)
        except InputError as error:
            raise PlanError(
                f"{type(self.model.model).__name__}: what is left does not fit together: {error}",
                hint="The family ties its sizes or layers to each other in a way that llmshrink does not know.",
            ) from error
        placeless = {surgery.tensors[key].key for key in small.anatomy.unused} - set(self.model.anatomy.unused)
        if placeless:
            raise PlanError(
                f"{type(self.model.model).__name__}: its layers are not alike: no layer that is kept has a place for "
                f"{min(placeless)}.",
                hint="Keep that layer, and let others go (--layers 0,2,3).",
            )
        if (why := other_constant(self.model, small, chosen.blocks)) is not None:
            named = {"the number of a layer (--layers)": len(chosen.blocks) < self.layers}
            named["the width (--hidden)"] = chosen.channels is not None
            from_what = " or ".join(what for what, so in named.items() if so)
            raise PlanError(
                f"{type(self.model.model).__name__}: {why}.",
                hint=f"It follows from {from_what}, which therefore cannot be cut here." if from_what else None,
            )
        inside = [m for block in small.anatomy.blocks for m in block.matrices]
        repair = self._repair(small, surgery) if self.spec.repair else None
        outside = [m for m in (small.anatomy.head,) if repair is not None and m in repair.matrices]
        methods: dict[Matrix, Method[Any]] = {m: Left(CutConfig()) for m in (*inside, *outside) if m is not None}
        work = lay_out(self._named(), small, load_format("dense"), methods, {}, {}, [])
        work.original = Original(self.model, surgery)
        work.repair, work.reconstruct = repair, self._stage.reconstruct
        work.events = [event for event in work.events if event.kind != "left_dense"]  # here that is no lack
        work.events += self._partly(chosen)
        return work

    def _partly(self, chosen: Chosen) -> list[Event]:
        """Widths that only some blocks have."""
        found = []
        for name, things in sorted(chosen.inside.items()):
            keys = {key for key, _ in self.widths[name].axes}
            without = sum(not keys.intersection(self.model.anatomy.blocks[index].keys) for index in chosen.blocks)
            if without and len(things[0]) < self.widths[name].total:
                message = f"{without} of {len(chosen.blocks)} layers have none of these {name}: they stay as they were"
                found.append(Event("partly_cut", message))
        return found

    def _named(self) -> Recipe:
        output = self._recipe.output or str(default_output(self.model.source.id, self.words))
        return self._recipe.model_copy(update={"output": output})

    @property
    def words(self) -> str:
        """What is kept, for the name of a folder."""
        spec = self.spec
        if spec.aimed:
            return f"cut-{spec.params or self.limit}".rstrip("%")
        parts = [f"{name}{getattr(spec, name)}".rstrip("%") for name in WIDTHS if getattr(spec, name) is not None]
        layers = len(spec.layers) if isinstance(spec.layers, list) else spec.layers
        return "-".join(["cut", *parts, *([f"layers{layers}".rstrip("%")] if layers is not None else [])])

    def _repair(self, small: StreamedModel, surgery: Surgery) -> Repair:
        """What is fitted: linears of which inputs are gone, and those that may write to the states between blocks."""
        fitted, rows, biases = set(), {}, {}
        for group in (group for block in small.anatomy.blocks for group in block.groups):
            for matrix in (m for m in group.matrices if m.kind != "experts"):
                outputs, inputs = (1, 0) if matrix.transposed else (0, 1)
                kept = surgery.tensors[matrix.key].kept
                writes = len(group.matrices) == 1 and matrix.shape[0] == small.hidden
                if not writes and inputs not in kept:
                    continue
                fitted.add(matrix)
                if outputs in kept:
                    rows[matrix] = kept[outputs]
                if (bias := small.map.origins.get(f"{matrix.site.module}.bias")) is not None:
                    biases[matrix] = bias.keys[0]
        head = small.anatomy.head
        if head is not None and 1 in surgery.tensors[head.key].kept:
            fitted.add(head)
        return Repair(frozenset(fitted), rows, biases, self.spec.damp)


def _in_words(numbers: list[int]) -> str:
    """Numbers in rising order: all of few; the ends of many that follow each other."""
    if len(numbers) > FEW and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))
