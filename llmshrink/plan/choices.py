"""What layers can get where a size is asked for: units that must be alike, their candidates, and what each weighs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llmshrink.allocate.solver import Option, solve
from llmshrink.block_types import BLOCK_TYPES
from llmshrink.errors import PlanError
from llmshrink.forms import Event
from llmshrink.model.anatomy import Matrix
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.layout import default_output
from llmshrink.plan.loading import fused
from llmshrink.plan.resolve import resolve
from llmshrink.plan.targets import targeted, with_names
from llmshrink.plan.transform import changeable
from llmshrink.plan.work import Work
from llmshrink.recipe.allocate import AllocateSpec
from llmshrink.recipe.method import DEFAULT_METHOD, MethodSpec
from llmshrink.recipe.schema import Recipe
from llmshrink.recipe.stages import ClusterStage, FactorizeStage, MatrixStage, PruneStage

Candidate = dict[str, Any]  # the method's keys that differ, as in `layers`
Assignment = Sequence[int]  # for each unit the position of its candidate

USUAL: list[Candidate] = [
    {"bits": 2, "group_size": 32},
    {"bits": 2, "group_size": 64},
    *({"bits": b} for b in (3, 4, 8)),
]
USUAL_EXPERTS: list[Candidate] = [{"bits": b} for b in (2, 3, 4, 8)]  # transformers reads one group size beside experts
USUAL_FACTORED: list[Candidate] = [{"keep": keep / 10} for keep in range(3, 10)]
USUAL_CLUSTERED: list[Candidate] = [{"bits": bits} for bits in (2, 3, 4, 5, 6)]
USUAL_PRUNED: list[Candidate] = [{"sparsity": share} for share in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)]
USUAL_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
NARROW_TYPES = ("Q4_0", "Q5_0")  # stand in where the width is not whole blocks of the others
ANY = "*"  # stands for the number of an expert
NEAR = 0.99  # of the size that is asked for: less is told


@dataclass(frozen=True)
class Unit:
    """Matrices that get the same candidate."""

    matrices: tuple[Matrix, ...]
    options: tuple[int, ...]  # positions of the candidates that it can get

    @cached_property
    def patterns(self) -> tuple[str, ...]:
        """Expressions that match exactly the names of its matrices, but for the numbers of experts."""
        escaped = ([r"\d+" if part == ANY else re.escape(part) for part in _parts(m)] for m in self.matrices)
        return tuple(dict.fromkeys(r"\.".join(parts) for parts in escaped))

    @cached_property
    def name(self) -> str:
        """Its layers as people read them: `model.layers.0.self_attn.q_proj, k_proj, v_proj`."""
        names = list(dict.fromkeys(".".join(_parts(m)) for m in self.matrices))
        return ", ".join([names[0], *(name.rpartition(".")[2] for name in names[1:])])


class Choices:
    """All that can be chosen for a model, within the size that a stage asks for.

    Attributes:
        candidates: What layers can get, by the method's keys.
        units: What gets one of them together, in the order of the forward pass.
        works: For each candidate the work in which every unit that can gets it.
        sizes: For each unit the bytes of its tensors with each of its options.
    """

    needs_data = True  # what is open is measured on calibration text

    def __init__(self, recipe: Recipe, stage: MatrixStage, model: StreamedModel) -> None:
        """Find the units.

        Raises:
            PlanError: there is nothing to choose, or a candidate cannot be carried out, alone or beside the others.
        """
        assert stage.allocate is not None
        self.spec: AllocateSpec = stage.allocate
        # A head that gets a tensor of its own weighs; but for that, candidates are measured on the weights as they are.
        self.model = changeable(stage.transform, model) if stage.transform else model
        self._gguf = stage.format is not None and stage.format.name == "gguf"
        method = stage.method or MethodSpec.model_validate({})
        named = MethodSpec.model_validate({**method.settings, "name": method.name or DEFAULT_METHOD})
        update: dict[str, Any] = {"method": named, "allocate": None}
        usual = self.spec.candidates is None
        if usual and stage.on_indivisible is None:
            update["on_indivisible"] = "smaller_group"  # the groups are nobody's wish
        self._stage = with_names(stage.model_copy(update=update), self.model)
        wanted = self._usual() if usual else list(self.spec.candidates or [])
        units = [Unit(ms, tuple(_options(wanted, ms, usual))) for ms in self._alike()]
        used = sorted({c for unit in units for c in unit.options})
        self.candidates = [wanted[c] for c in used]
        self.units = [Unit(u.matrices, tuple(map(used.index, u.options))) for u in units if u.options]
        if not self.units:
            raise PlanError("`allocate` has nothing to choose: `layers` and `ignore` say what every layer gets.")
        words = "mixed" if self.spec.bpw is None else f"{self.spec.bpw:g}bpw"
        output = recipe.output or str(default_output(model.source.id, f"{named.name}-{words}"))
        self._recipe = recipe.model_copy(update={"output": output})
        everywhere = [[_nearest(c, unit.options) for unit in self.units] for c in range(len(self.candidates))]
        self.works = [self.work(assignment) for assignment in everywhere]
        for work in self.works:
            work.reconstruct = work.transforms = work.tune = None  # candidates are measured as the method makes them
        if any(work.inputs for work in self.works):
            raise PlanError("`allocate` chooses for weights alone: leave out `inputs`.")
        self.work([unit.options[i % len(unit.options)] for i, unit in enumerate(self.units)])  # all kinds together
        self.sizes = [[_bytes(self.works[c], unit) for c in unit.options] for unit in self.units]
        first = sum(_bytes(self.works[0], unit) for unit in self.units)
        self._rest = self.size(self.works[0]) - first

    def _usual(self) -> list[Candidate]:
        if self._gguf:
            return [{"type": name} for name in (*USUAL_TYPES, *NARROW_TYPES)]
        if isinstance(self._stage, PruneStage):
            return USUAL_PRUNED
        if isinstance(self._stage, ClusterStage):
            return USUAL_CLUSTERED
        if isinstance(self._stage, FactorizeStage):
            return USUAL_FACTORED
        experts = any(m.kind == "experts" for block in self.model.anatomy.blocks for m in block.matrices)
        return USUAL_EXPERTS if experts else USUAL

    def _alike(self) -> Iterator[tuple[Matrix, ...]]:
        """The matrices that are open, those that a runtime holds as one together; llama.cpp holds each by itself."""
        anatomy = self.model.anatomy
        ties = {} if self._gguf else {m: tuple(alike) for b in anatomy.blocks for alike in fused(b) for m in alike}
        seen: set[Matrix] = set()
        for matrix in anatomy.matrices if self._gguf else targeted(self._stage, self.model):
            if matrix not in seen and not self._stage.names(matrix.name):
                alike = tuple(m for m in ties.get(matrix, (matrix,)) if not self._stage.names(m.name))
                seen.update(alike)
                yield alike

    # --- sizes

    @cached_property
    def limit(self) -> int:
        """Bytes that the result may have, of all that `size` counts."""
        if self.spec.size is not None:
            return self.spec.size.of(self.model.source.checkpoint.file_bytes)
        return int((self.spec.bpw or 0) * self.model.parameters / 8)

    def size(self, work: Work) -> int:
        """Bytes of the files that hold tensors; where bits per weight are asked for, of the tensors."""
        return sum((work.file_bytes if self.spec.size is not None else work.tensor_bytes).values())

    @cached_property
    def smallest(self) -> int:
        """The least size that there is with these candidates."""
        return self.size(self.work(self._least))

    @cached_property
    def largest(self) -> int:
        """The size of the largest candidate everywhere."""
        return self.size(self.work(self._most))

    @property
    def _least(self) -> Assignment:
        return [unit.options[sizes.index(min(sizes))] for unit, sizes in zip(self.units, self.sizes, strict=True)]

    @property
    def _most(self) -> Assignment:
        return [unit.options[sizes.index(max(sizes))] for unit, sizes in zip(self.units, self.sizes, strict=True)]

    def check(self) -> None:
        """Refuse a size that cannot be met.

        Raises:
            PlanError: none is asked for, or no choice is as small.
        """
        if not self.spec.aimed:
            raise PlanError(
                "`allocate` must say how large the result may be.",
                hint="Give --target-size 3.5GiB (allocate.size) or --target-bpw 3.2 (allocate.bpw).",
            )
        if self.smallest > self.limit:
            bpw = 8 * self.smallest / self.model.parameters
            raise PlanError(
                f"No choice of candidates has {self.limit:,} bytes or fewer: the smallest has {self.smallest:,} "
                f"({bpw:.3f} bits per weight, what is left as it is counted).",
                hint=f"Ask for {_ceil(bpw)} bits per weight or more, or give candidates with fewer bits.",
            )

    # --- what is chosen

    @property
    def decided(self) -> Assignment | None:
        """What is chosen without measuring: the largest candidates, where they all fit; else None."""
        return self._most if self.largest <= self.limit else None

    def guessed(self) -> Work:
        """Work of the size that is asked for, before anything is measured: each bit fewer quadruples the error."""
        bits = [
            [8 * size / sum(m.numel for m in unit.matrices) for size in sizes]
            for unit, sizes in zip(self.units, self.sizes, strict=True)
        ]
        scores = [
            [sum(m.numel for m in u.matrices) * 4.0**-b for b in row] for u, row in zip(self.units, bits, strict=True)
        ]
        return self.work(self.decided or self.assign(scores))

    def assign(self, scores: Sequence[Sequence[float]]) -> Assignment:
        """The candidates whose scores add up to least, within the size that is asked for.

        Args:
            scores: of each option of each unit.
        """
        options = [
            [Option(size, score) for size, score in zip(*pair, strict=True)]
            for pair in zip(self.sizes, scores, strict=True)
        ]
        budget = self.limit - self._rest
        while (found := solve(options, budget)) is not None:
            assignment = [unit.options[i] for unit, i in zip(self.units, found, strict=True)]
            over = self.size(self.work(assignment)) - self.limit  # headers differ a little
            if over <= 0:
                return assignment
            budget -= over
        return self._least  # which fits, or the size would have been refused

    def work(self, assignment: Assignment) -> Work:
        """The work in which each unit gets its candidate."""
        recipe = self.recipe(assignment)
        stage = next(stage for stage in recipe.stages if isinstance(stage, MatrixStage))
        return resolve(recipe, stage, self.model)

    def recipe(self, assignment: Assignment) -> Recipe:
        """The recipe that names what every layer gets, so that nothing is left to choose."""
        layers = {
            pattern: self.candidates[c]
            for unit, c in zip(self.units, assignment, strict=True)
            for pattern in unit.patterns
        }
        stage = self._stage.model_copy(update={"layers": {**layers, **self._stage.layers}})
        stages = [stage if isinstance(old, MatrixStage) else old for old in self._recipe.stages]
        return self._recipe.model_copy(update={"stages": stages})

    def events(self, work: Work) -> list[Event]:
        """What to tell of the size that was reached."""
        size, asked = self.size(work), self.limit
        before = [] if work.transforms is None else [work.transforms.words]
        before += ["tokens were weighed by gradients"] * work.needs_slopes
        told = [Event("measured_before", f"costs were measured before {what}") for what in before]
        if self.decided is not None:
            message = f"the largest candidates fit into {asked:,} bytes with {size:,}: nothing was measured"
            return [Event("target_above", message)]
        if size < NEAR * asked:
            message = (
                f"{size:,} bytes are {1 - size / asked:.1%} less than the {asked:,} asked for: the next step is larger"
            )
            told.append(Event("target_below", message))
        return told


def _options(candidates: list[Candidate], matrices: tuple[Matrix, ...], usual: bool) -> Iterator[int]:
    """Positions of the candidates that matrices can get; those that somebody typed are all tried, or refused."""
    widths = {m.shape[1] for m in matrices}
    for number, keys in enumerate(candidates):
        kind = keys.get("type")
        size = BLOCK_TYPES[kind].size if kind in BLOCK_TYPES else keys.get("group_size") or 1
        narrow = kind not in NARROW_TYPES or all(width % 256 for width in widths)
        if not usual or (all(width % size == 0 for width in widths) and narrow):
            yield number


def _nearest(candidate: int, options: tuple[int, ...]) -> int:
    return min(options, key=lambda option: abs(option - candidate))


def _bytes(work: Work, unit: Unit) -> int:
    """Of all tensors that store a unit."""
    return sum(tensor.nbytes for matrix in unit.matrices for tensor in work.packed(matrix).values())


def _parts(matrix: Matrix) -> list[str]:
    """The parts of a matrix's name, with a star for the number of an expert."""
    parts = matrix.name.split(".")
    if matrix.site.expert is not None:
        place = len(parts) - 1 - parts[::-1].index(str(matrix.site.expert))
        parts[place] = ANY
    return parts


def _ceil(bpw: float) -> float:
    return -(-bpw * 1000 // 1) / 1000
