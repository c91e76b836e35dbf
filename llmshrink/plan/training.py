"""From a stage that trains to who learns, who teaches, and the work of writing what was learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmshrink.errors import PlanError
from llmshrink.formats import load_format
from llmshrink.methods.base import method_name
from llmshrink.methods.cut import CutConfig
from llmshrink.methods.trained import Trained
from llmshrink.model.source import Source, open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.model.words import check_same_tokens
from llmshrink.plan.cut import Cuts
from llmshrink.plan.layout import default_output, lay_out
from llmshrink.plan.qat import plan_rounding, start_recipe, work_of_codes
from llmshrink.plan.steps import Steps
from llmshrink.plan.work import Work, main_method
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
        guess: The work of writing the student, whose sizes are known before it has learned anything; of one that is
            trained through rounding, the work of rounding it first.
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
        if stage.teacher is None and stage.student is None and stage.qat is None:
            raise PlanError(
                "There is nothing to learn: without `teacher` the model teaches itself, and without `student` or `qat` "
                "it stays as large as it is.",
                hint="Name a teacher (--teacher), what the student keeps (--layers, --neurons), or its bits (--bits 4 "
                "--qat).",
            )
        self.teacher: Source = model.source if stage.teacher is None else open_source(stage.teacher)
        if stage.teacher is not None:
            check_same_tokens(model.source, self.teacher)
            if self.teacher.quantization is not None:
                raise PlanError(
                    f"{self.teacher.id} is quantized: teachers are read as floats.",
                    hint="Name the model that it was made from, or `llmshrink export --to dense` it first.",
                )
        self.cuts = None if stage.student is None else Cuts(recipe, CutStage(task="prune", cut=stage.student), model)
        student = model if self.cuts is None else self._cut_work().model
        self.guess = self.work(student) if stage.qat is None else plan_rounding(recipe, stage.qat, student)

    def _cut_work(self) -> Work:
        assert self.cuts is not None
        return self.cuts.work(self.cuts.first(self.cuts.shapes[0]))

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

    def start_recipe(self, folder: Path, student: Path | None) -> Recipe:
        """The recipe that rounds the student into a folder; `student` is where it lies, None: it is the model."""
        assert self.stage.qat is not None
        return start_recipe(self._recipe, self.stage.qat, folder, student)

    def learned(self, model: StreamedModel) -> Work:
        """The work of writing what was learned."""
        qat = self.stage.qat
        return self.work(model) if qat is None else work_of_codes(self._recipe, qat, model)

    def work(self, model: StreamedModel) -> Work:
        """The work of writing a student as it is."""
        matrices = [m for block in model.anatomy.blocks for m in block.matrices]
        output = self._recipe.output or str(default_output(self.model.source.id, "distilled"))
        recipe = self._recipe.model_copy(update={"output": output})
        methods = {matrix: Trained(CutConfig()) for matrix in matrices}
        work = lay_out(recipe, model, load_format("dense"), dict(methods), {}, {}, [])
        work.events = [event for event in work.events if event.kind != "left_dense"]  # here that is no lack
        return work
