"""What is open where layers lose shares of their own: which of them lose the same, and the recipe that says it."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Any

from llmshrink.allocate.solver import Option, solve
from llmshrink.errors import PlanError
from llmshrink.forms import Event
from llmshrink.methods import load_method
from llmshrink.methods.base import ShareConfig
from llmshrink.model.anatomy import Matrix
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.choices import Unit
from llmshrink.plan.resolve import resolve
from llmshrink.plan.targets import with_names
from llmshrink.plan.transform import changeable
from llmshrink.plan.work import main_method
from llmshrink.recipe.ratios import RankSpec, RatioSpec
from llmshrink.recipe.schema import Recipe
from llmshrink.recipe.stages import FactorizeStage, MatrixStage, PruneStage

MOST = 0.99  # of a layer that may go


class Ratios:
    """All that a recipe leaves open of how much of each layer goes.

    Attributes:
        spec: How that is found.
        config: The method's settings.
        sparsity: Share of the numbers of all units together that goes.
        units: What gets one share: by outliers the matrices of a block; else each alone, experts that are alike
            together.
        sets: Of matrices of several blocks that can share a tensor.
        work: The work in which every unit loses the same share: its bytes are those of any, but for the rounding of
            shares to whole weights, or ranks. Where matrices are tied or not, it ties them all.
        guess: One that loses as much as is asked: the same, or with some matrices tied.
    """

    def __init__(self, recipe: Recipe, stage: PruneStage | FactorizeStage, model: StreamedModel) -> None:
        """Find the units.

        Raises:
            PlanError: `layers` and `ignore` say it all, more is to go than may, or the recipe cannot be carried out.
        """
        assert stage.ratios is not None
        self.spec: RatioSpec | RankSpec = stage.ratios
        self.model = model
        config = load_method(str(stage.method.name)).Config(**stage.method.settings)
        assert isinstance(config, ShareConfig)
        self.config, self.sparsity = config, config.share
        if self.sparsity > MOST and isinstance(self.spec, RatioSpec):
            raise PlanError(
                f"`ratios` leave at least {1 - MOST:.0%} of each layer, and {self.sparsity:g} of all numbers are to go."
            )
        self._stage = with_names(stage.model_copy(update={"ratios": None}), model)
        self.work = resolve(recipe, self._stage, changeable(stage.transform, model) if stage.transform else model)
        left = {m.key for m in self.work.left}
        found = ([m for m in matrices if m.key not in left] for matrices in self._alike(model))
        self.units = [Unit(tuple(matrices), ()) for matrices in found if matrices]
        if not self.units and isinstance(self.spec, RatioSpec):
            raise PlanError("`ratios` has nothing to find: `layers` and `ignore` say what every layer gets.")
        if recipe.output is None:
            self.work.output = self.work.output.with_name(f"{self.work.output.name}-{self.spec.name}")
        self._recipe = recipe.model_copy(update={"output": str(self.work.output)})
        open_ = {m for unit in self.units for m in unit.matrices}
        self.sets = [stack for stack in self.work.stacks if open_.issuperset(stack)]
        self.guess = self.work
        if self.spec.name == "similarity":
            first = self.recipe(self.tied(range(1, len(self.sets) + 1)))
            self.guess = resolve(first, next(s for s in first.stages if isinstance(s, FactorizeStage)), self.model)

    def _alike(self, model: StreamedModel) -> Iterator[tuple[Matrix, ...]]:
        """The matrices that are open, in the order of the forward pass, those together that get one share."""
        for block in model.anatomy.blocks:
            found = [m for m in block.matrices if not self._stage.names(m.name)]
            alike: dict[Any, list[Matrix]] = {}
            for matrix in found:
                key = block.index if self.spec.name == "owl" else Unit((matrix,), ()).patterns
                alike.setdefault(key, []).append(matrix)
            yield from map(tuple, alike.values())

    @property
    def needs_data(self) -> bool:
        """Whether finding the shares takes calibration text."""
        by_method = self.spec.name == "spectrum" and any(map(self.work.reads_data, self.work.methods))
        return self.spec.name in ("owl", "similarity") or by_method

    @property
    def sizes(self) -> list[int]:
        """Weights of each unit."""
        return [sum(m.numel for m in unit.matrices) for unit in self.units]

    @property
    def settings(self) -> dict[str, Any]:
        """Of the method, with the share that all units drop together."""
        return dict(main_method(self.work.methods).config.model_dump(mode="json"))

    @property
    def events(self) -> list[Event]:
        """What to tell of how shares are found."""
        transforms = self.work.transforms
        return [] if transforms is None else [Event("measured_before", f"shares were found before {transforms.words}")]

    def tied(self, lost: Sequence[float]) -> list[float]:
        """The share that each unit saves where sets of matrices are tied, or not, so that least is lost together.

        Args:
            lost: by each set, if it is tied.

        Raises:
            PlanError: with all of them tied there are more numbers than are to be kept.
        """
        sizes = [stack[0].numel for stack in self.sets]
        options = [
            [Option(size, score), Option(len(stack) * size, 0.0)]
            for stack, size, score in zip(self.sets, sizes, lost, strict=True)
        ]
        alone = sum(self.sizes) - sum(len(stack) * size for stack, size in zip(self.sets, sizes, strict=True))
        found = solve(options, int((1 - self.sparsity) * sum(self.sizes)) - alone)
        if found is None:
            least = (alone + sum(sizes)) / sum(self.sizes)
            raise PlanError(
                f"keep {1 - self.sparsity:g}: with all that can be one, {least:.3g} of the numbers are left.",
                hint="Keep more, or let more blocks share (method.blocks).",
            )
        ties = {m.key: len(stack) for stack, choice in zip(self.sets, found, strict=True) if choice == 0 for m in stack}
        return [1 - 1 / ties[u.matrices[0].key] if u.matrices[0].key in ties else 0.0 for u in self.units]

    def recipe(self, shares: Sequence[float], alone: Container[int] = ()) -> Recipe:
        """The recipe that names the share of every unit, so that nothing is left to find.

        Args:
            shares: of each unit.
            alone: positions of those that share no factor, where their method would.
        """
        layers: dict[str, Any] = {}
        for number, (unit, share) in enumerate(zip(self.units, shares, strict=True)):
            keys = self.config.at(share)
            keys = keys and {**keys, **({"blocks": 1} if number in alone else {})}
            layers |= dict.fromkeys(unit.patterns, keys)
        stage = self._stage.model_copy(update={"layers": {**layers, **self._stage.layers}})
        stages = [stage if isinstance(old, MatrixStage) else old for old in self._recipe.stages]
        return self._recipe.model_copy(update={"stages": stages})
