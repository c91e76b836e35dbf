"""From a stage that trains to who learns, who teaches, and the work of writing what was learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmshrink.errors import PlanError
from llmshrink.formats import load_format
from llmshrink.forms import Event
from llmshrink.methods.base import Method, method_name
from llmshrink.methods.cut import CutConfig
from llmshrink.methods.trained import Trained
from llmshrink.model.anatomy import Matrix
from llmshrink.model.source import Source, open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.model.words import check_other_tokens, check_same_tokens
from llmshrink.plan.cache import keeping
from llmshrink.plan.cut import Cuts
from llmshrink.plan.layout import default_output, lay_out
from llmshrink.plan.pairs import layer_pairs
from llmshrink.plan.qat import plan_rounding, rounded_recipe, work_of_codes
from llmshrink.plan.steps import ENDLESS, Steps
from llmshrink.plan.work import Work, main_method
from llmshrink.plan.zeros import drawn_weights, matrices_of, refuse_codes, refuse_without_zeros, sparse_again
from llmshrink.recipe.distill import DistillStage
from llmshrink.recipe.schema import EvaluationSpec, Recipe
from llmshrink.recipe.stages import CutStage


class Training:
    """What a stage trains.

    Attributes:
        stage: What the recipe says.
        model: That comes in.
        teacher: Whom the student learns from; None: nobody who is here, but a cache of what one said.
        steps: Of gradient.
        cuts: What makes the student of the model; None: the model is it.
        guess: The work of writing the student, whose sizes are known before it has learned anything; of one that is
            trained through rounding, the work of rounding it first.
        keeping: Of the teacher's words; None: it is asked at every step.
        streamed: The teacher, block by block, where its words are written down.
    """

    needs_data = False  # to calibrate with

    def __init__(self, recipe: Recipe, stage: DistillStage, model: StreamedModel) -> None:
        """Find who learns from whom.

        Raises:
            PlanError: the model cannot be trained so, or its teacher cannot teach it.
        """
        self.stage, self.model, self._recipe = stage, model, recipe
        self.steps = Steps(stage.train, model)
        if not model.task.causal:
            raise PlanError(f"{model.source.id}: only models that predict the next token can be distilled.")
        refuse_codes(model)
        self._check_lottery()
        self.steps.check()
        known = model.source if stage.student or stage.exits or stage.lottery or stage.qat else None
        if model.original is not model and not stage.alone:
            known = model.original.source  # of a stage behind others
        self.teacher: Source | None = known if stage.teacher is None else open_source(stage.teacher)
        self.keeping = keeping(stage, model.source, self.teacher)
        if self.teacher is None and (self.keeping is None or self.keeping.found is None):
            raise PlanError(
                "There is nothing to learn: without `teacher` the model teaches itself, and without `student` or `qat` "
                "it stays as large as it is.",
                hint="Name a teacher (--teacher), what the student keeps (--layers, --neurons), its bits (--bits 4 "
                "--qat), `exits`, which the last layer teaches, or the cache.folder of what a teacher said.",
            )
        self._check_teacher()
        written = self.keeping is not None and self.keeping.found is None
        self.streamed = StreamedModel(self.teacher, model.device) if written and self.teacher is not None else None
        self.cuts = None if stage.student is None else Cuts(recipe, CutStage(task="prune", cut=stage.student), model)
        if self.cuts is None and stage.train.keep_zeros is True:
            refuse_without_zeros(model)
        student = model if self.cuts is None else self._cut_work().model
        self.guess = self.work(student) if stage.qat is None else plan_rounding(recipe, stage.qat, student)
        self._check_exits()
        if self.foreign and self.teacher is not None:
            message = (
                f"{self.teacher.id} reads other tokens: the result is compared with {model.source.id} as it was, and "
                "on rows held back its surprise at the text is measured"
            )
            self.guess.events.append(Event("other_tokens", message))
        self._check_hidden()
        if stage.policy is not None and stage.loss.alpha == 0:
            raise PlanError(
                "policy: the student's own words are learned from by what the teacher finds of them, and loss.alpha 0 "
                "does not ask it.",
                hint="Give loss.alpha (--alpha), or leave out `policy`.",
            )

    @property
    def taught_by(self) -> str:
        """Who teaches, in words."""
        if self.stage.alone:
            return "its last layer"
        if self.teacher is not None:
            return self.teacher.id
        assert self.keeping is not None and self.keeping.found is not None
        return str(self.keeping.found["teacher"])

    @property
    def kept_bytes(self) -> int:
        """Bytes on disk, at most, of the words of its teacher that it writes down; 0: only the text says how many."""
        keeping = self.keeping
        if keeping is None or keeping.found is not None or self.steps.limit is None:
            return 0
        return keeping.kind.bytes(self.steps.rows, self.steps.rows * (self.steps.length - 1))

    def _cut_work(self) -> Work:
        assert self.cuts is not None
        return self.cuts.work(self.cuts.first(self.cuts.shapes[0]))

    @property
    def foreign(self) -> bool:
        """Whether the teacher reads tokens of its own."""
        return self.stage.loss.name == "uld"

    def _check_lottery(self) -> None:
        """Refuse what no lottery is drawn from."""
        if self.stage.lottery is None:
            return
        if self.model.weights.compressed:
            raise PlanError(
                f"{self.model.source.id} is stored without its zeros: `lottery` begins with all weights.",
                hint="Draw from the model before it was pruned, or leave out `lottery`.",
            )
        if self.steps.processes > 1:
            raise PlanError(
                f"`lottery` trains in one process, and {self.steps.processes} were launched.",
                hint="Leave out the launcher.",
            )

    def _check_teacher(self) -> None:
        """Refuse a teacher whose words cannot be compared with the student's, or that is no floats."""
        if self.stage.teacher is None or self.teacher is None:
            if self.foreign:
                raise PlanError(
                    "loss.name uld is for a teacher that reads other tokens, and here the model teaches itself.",
                    hint="Name a teacher (--teacher), or take --loss kl.",
                )
            return
        check = check_other_tokens if self.foreign else check_same_tokens
        check(self.model.source, self.teacher)
        if self.teacher.quantization is not None:
            raise PlanError(
                f"{self.teacher.id} is quantized: teachers are read as floats.",
                hint="Name the model that it was made from, or `llmshrink export --to dense` it first.",
            )

    def _check_exits(self) -> None:
        """Refuse exits behind which there is no layer."""
        last = len(self.guess.model.anatomy.blocks) - 1
        if self.stage.exits and self.stage.exits[-1] >= last:
            raise PlanError(
                f"exits names layer {self.stage.exits[-1]}, and layer {last} is the last, which teaches them.",
                hint=f"Name layers from 0 to {last - 1}." if last else "A model of one layer has none.",
            )

    def _check_hidden(self) -> None:
        """Refuse states that cannot be compared."""
        spec = self.stage.hidden
        if spec is None:
            return
        self.pairs(None)
        widths = self.widths
        if spec.projection is False and len(set(widths)) > 1:
            raise PlanError(
                f"hidden.projection is false, and states are {widths[0]} wide here, {widths[1]} in the teacher.",
                hint="Leave it out: a matrix is learned for each layer and thrown away in the end.",
            )

    @property
    def widths(self) -> tuple[int, int]:
        """Of the states between layers, the student's and the teacher's."""
        assert self.teacher is not None
        width: int = self.teacher.config.get_text_config(decoder=True).hidden_size
        return self.guess.model.hidden, width

    def pairs(self, kept: Sequence[int] | None) -> Mapping[int, int]:
        """Which layer of the teacher each layer of the student is drawn to; none, where states are left alone.

        Args:
            kept: the model's layers that the student is made of; None: all, or not known yet.
        """
        if self.stage.hidden is None or self.teacher is None:
            return {}
        student = len(self.guess.model.anatomy.blocks)
        teacher: int = self.teacher.config.get_text_config(decoder=True).num_hidden_layers
        own = kept if self.teacher is self.model.source else None
        return layer_pairs(self.stage.hidden, student, teacher, own)

    def student_recipe(self, folder: Path) -> Recipe:
        """The recipe that makes the student in a folder."""
        assert self.stage.student is not None
        changes = {
            "stages": [CutStage(task="prune", cut=self.stage.student)],
            "evaluation": EvaluationSpec(data=[], speed=False),
            "output": str(folder),
        }
        return self._recipe.model_copy(update=changes)

    @property
    def method(self) -> dict[str, Any]:
        """What the stage does, for its report."""
        if self.stage.qat is None:
            return {"name": "distill"}
        first = main_method(self.guess.methods)
        return {**first.config.model_dump(mode="json"), "name": "distill", "start": method_name(first)}

    def rounded_recipe(self, folder: Path, student: Path | None) -> Recipe:
        """The recipe that rounds the student into a folder; `student` is where it lies, None: it is the model."""
        assert self.stage.qat is not None
        return rounded_recipe(self._recipe, self.stage.qat, folder, student)

    def learned(self, model: StreamedModel) -> Work:
        """The work of writing what was learned."""
        qat = self.stage.qat
        return self.work(model) if qat is None else work_of_codes(self._recipe, qat, model)

    def work(self, model: StreamedModel) -> Work:
        """The work of writing a student as it is; where zeros were not stored and stay, they are not again."""
        output = self._recipe.output or str(default_output(self.model.source.id, "distilled"))
        recipe = self._recipe.model_copy(update={"output": output})
        matrices, before, events = matrices_of(model), self.model.weights, list[Event]()
        methods: dict[Matrix, Method[Any]] = {matrix: Trained(CutConfig()) for matrix in matrices}
        fmt = load_format("dense")
        if self.stage.lottery is not None and not any(matrix.kind == "experts" for matrix in matrices):
            fmt, drawn = load_format("sparse"), None if model is self.model else model
            methods = drawn_weights(matrices, drawn, self.stage.lottery.sparsity)
        elif before.compressed and self.stage.train.keep_zeros is not False:
            fmt, methods = before.format, sparse_again(self.model, model)
        elif before.compressed:
            events.append(Event("decompressed", "zeros were not stored, and may learn: all weights are written"))
        left = {matrix: "it was stored dense" for matrix in matrices if matrix not in methods}
        work = lay_out(recipe, model, fmt, methods, {}, left, events)
        work.stored_before = {key: before.stored_bytes(key) for key in before.compressed}
        work.events = [event for event in work.events if event.kind != "left_dense"]  # here that is no lack
        if self.steps.endless:
            message = f"nothing says how long to train (--max-steps, --max-tokens): {ENDLESS:,} tokens at most"
            work.events.append(Event("endless_text", message))
        return work


def trained_work(recipe: Recipe, model: StreamedModel, output: str) -> Work:
    """The work of writing a model as training left it.

    Args:
        recipe: may name the output.
        model: what is written.
        output: its folder, where the recipe names none.
    """
    matrices = [m for block in model.anatomy.blocks for m in block.matrices]
    recipe = recipe.model_copy(update={"output": recipe.output or output})
    methods = {matrix: Trained(CutConfig()) for matrix in matrices}
    work = lay_out(recipe, model, load_format("dense"), dict(methods), {}, {}, [])
    work.events = [event for event in work.events if event.kind != "left_dense"]  # here that is no lack
    return work
