"""From a stage that trains to who learns, who teaches, and the work of writing what was learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llmshrink.errors import PlanError
from llmshrink.formats import load_format
from llmshrink.forms import Event
from llmshrink.methods.cut import CutConfig
from llmshrink.methods.trained import Trained
from llmshrink.model.source import Source, open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.model.words import check_other_tokens, check_same_tokens
from llmshrink.plan.cut import Cuts
from llmshrink.plan.layout import default_output, lay_out
from llmshrink.plan.pairs import layer_pairs
from llmshrink.plan.steps import Steps
from llmshrink.plan.work import Work
from llmshrink.recipe.distill import DistillStage
from llmshrink.recipe.schema import EvaluationSpec, Recipe
from llmshrink.recipe.stages import CutStage


class Training:
    """What a stage trains.

    Attributes:
        stage: What the recipe says.
        model: That comes in.
        teacher: Whom the student learns from.
        steps: Of gradient.
        cuts: What makes the student of the model; None: the model is it.
        guess: The work of writing the student, whose sizes are known before it has learned anything.
    """

    needs_data = True

    def __init__(self, recipe: Recipe, stage: DistillStage, model: StreamedModel) -> None:
        """Find who learns from whom.

        Raises:
            PlanError: the model cannot be trained so, or its teacher cannot teach it.
        """
        self.stage, self.model, self._recipe = stage, model, recipe
        self.steps = Steps(stage.train, model)
        if not model.task.causal:
            raise PlanError(f"{model.source.id}: only models that predict the next token can be distilled.")
        if model.weights.compressed or model.source.gguf:
            raise PlanError(
                f"{model.source.id} is stored as {model.weights.format.name}: codes cannot be trained.",
                hint="`llmshrink export --to dense` writes it without codes; distill that, and quantize the result.",
            )
        if stage.teacher is None and stage.student is None and not stage.exits:
            raise PlanError(
                "There is nothing to learn: without `teacher` the model teaches itself, and without `student` it stays "
                "as large as it is.",
                hint="Name a teacher (--teacher), what the student keeps (--layers, --neurons), or `exits`, which the "
                "last layer teaches.",
            )
        self.teacher: Source = model.source if stage.teacher is None else open_source(stage.teacher)
        self._check_tokens()
        if stage.teacher is not None and self.teacher.quantization is not None:
            raise PlanError(
                f"{self.teacher.id} is quantized: teachers are read as floats.",
                hint="Name the model that it was made from, or `llmshrink export --to dense` it first.",
            )
        self.cuts = None if stage.student is None else Cuts(recipe, CutStage(task="prune", cut=stage.student), model)
        self.guess = self.work(model if self.cuts is None else self._cut_work().model)
        self._check_exits()
        if self.foreign:
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

    def _cut_work(self) -> Work:
        assert self.cuts is not None
        return self.cuts.work(self.cuts.first(self.cuts.shapes[0]))

    @property
    def taught_by(self) -> str:
        """Who teaches, in words."""
        return "its last layer" if self.stage.alone else self.teacher.id

    @property
    def foreign(self) -> bool:
        """Whether the teacher reads tokens of its own."""
        return self.stage.loss.name == "uld"

    def _check_tokens(self) -> None:
        """Refuse a teacher whose words cannot be compared with the student's."""
        if self.foreign and self.stage.teacher is None:
            raise PlanError(
                "loss.name uld is for a teacher that reads other tokens, and here the model teaches itself.",
                hint="Name a teacher (--teacher), or take --loss kl.",
            )
        check = check_other_tokens if self.foreign else check_same_tokens
        if self.stage.teacher is not None:
            check(self.model.source, self.teacher)

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
        spec, widths = self.stage.hidden, self.widths
        if spec is None:
            return
        self.pairs(None)
        if spec.projection is False and len(set(widths)) > 1:
            raise PlanError(
                f"hidden.projection is false, and states are {widths[0]} wide here, {widths[1]} in the teacher.",
                hint="Leave it out: a matrix is learned for each layer and thrown away in the end.",
            )

    @property
    def widths(self) -> tuple[int, int]:
        """Of the states between layers, the student's and the teacher's."""
        width: int = self.teacher.config.get_text_config(decoder=True).hidden_size
        return self.guess.model.hidden, width

    def pairs(self, kept: Sequence[int] | None) -> Mapping[int, int]:
        """Which layer of the teacher each layer of the student is drawn to; none, where states are left alone.

        Args:
            kept: the model's layers that the student is made of; None: all, or not known yet.
        """
        if self.stage.hidden is None:
            return {}
        student = len(self.guess.model.anatomy.blocks)
        teacher: int = self.teacher.config.get_text_config(decoder=True).num_hidden_layers
        own = kept if self.stage.teacher is None else None
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

    def work(self, model: StreamedModel) -> Work:
        """The work of writing a student as it is."""
        matrices = [m for block in model.anatomy.blocks for m in block.matrices]
        output = self._recipe.output or str(default_output(self.model.source.id, "distilled"))
        recipe = self._recipe.model_copy(update={"output": output})
        methods = {matrix: Trained(CutConfig()) for matrix in matrices}
        work = lay_out(recipe, model, load_format("dense"), dict(methods), {}, {}, [])
        work.events = [event for event in work.events if event.kind != "left_dense"]  # here that is no lack
        return work
