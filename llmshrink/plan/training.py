"""From a stage that trains to who learns, who teaches, and the work of writing what was learned."""

from __future__ import annotations

from pathlib import Path

from llmshrink.errors import PlanError
from llmshrink.formats import load_format
from llmshrink.methods.cut import CutConfig
from llmshrink.methods.trained import Trained
from llmshrink.model.source import Source, open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.model.words import check_same_tokens
from llmshrink.plan.cache import keeping
from llmshrink.plan.cut import Cuts
from llmshrink.plan.layout import default_output, lay_out
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
        teacher: Whom the student learns from; None: nobody who is here, but a cache of what one said.
        steps: Of gradient.
        cuts: What makes the student of the model; None: the model is it.
        guess: The work of writing the student, whose sizes are known before it has learned anything.
        keeping: Of the teacher's words; None: it is asked at every step.
        streamed: The teacher, block by block, where its words are written down.
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
        alone = stage.teacher is None and stage.student is None
        self.teacher: Source | None = model.source if stage.teacher is None else open_source(stage.teacher)
        self.keeping = keeping(stage, model.source, None if alone else self.teacher)
        if alone and (self.keeping is None or self.keeping.found is None):
            raise PlanError(
                "There is nothing to learn: without `teacher` the model teaches itself, and without `student` it stays "
                "as large as it is.",
                hint="Name a teacher (--teacher), what the student keeps (--layers, --neurons), or the cache.folder of "
                "what a teacher said.",
            )
        if alone:
            self.teacher = None
        elif stage.teacher is not None:
            check_same_tokens(model.source, self.teacher)
            if self.teacher.quantization is not None:
                raise PlanError(
                    f"{self.teacher.id} is quantized: teachers are read as floats.",
                    hint="Name the model that it was made from, or `llmshrink export --to dense` it first.",
                )
        written = self.keeping is not None and self.keeping.found is None
        self.streamed = StreamedModel(self.teacher, model.device) if written and self.teacher is not None else None
        self.cuts = None if stage.student is None else Cuts(recipe, CutStage(task="prune", cut=stage.student), model)
        self.guess = self.work(model if self.cuts is None else self._cut_work().model)

    @property
    def taught_by(self) -> str:
        """The teacher's name."""
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
