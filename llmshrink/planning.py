"""From a recipe to its plan: which model, what is done to it, in how much memory and on how much disk."""

from __future__ import annotations

from llmshrink.checks.gates import refuse_unanswerable, size_limit
from llmshrink.demo import MODEL_DIR, NAME
from llmshrink.engine.budget import (
    adapted_evaluation,
    compress_economy,
    compress_scratch,
    evaluation_economy,
    evaluation_states,
    planned_adapting,
)
from llmshrink.errors import PlanError
from llmshrink.model.source import Source, open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.adapting import Adapting
from llmshrink.plan.choices import Choices
from llmshrink.plan.cut import Cuts
from llmshrink.plan.describe import describe
from llmshrink.plan.describe_adapter import describe_adapter
from llmshrink.plan.export import resolve_export
from llmshrink.plan.layout import row_length
from llmshrink.plan.ratios import Ratios
from llmshrink.plan.resolve import resolve
from llmshrink.plan.schema import Plan
from llmshrink.plan.training import Training
from llmshrink.plan.transform import changeable
from llmshrink.plan.work import Work
from llmshrink.recipe.distill import DistillStage
from llmshrink.recipe.lora import LoraStage
from llmshrink.recipe.schema import Recipe
from llmshrink.recipe.stages import CutStage, ExportStage, FactorizeStage, MatrixStage, PruneStage


def open_model(recipe: Recipe) -> tuple[Source, bool]:
    """The model of a recipe, and whether it is the embedded one."""
    if recipe.model.id is None or recipe.model.id == NAME:
        embedded = open_source(str(MODEL_DIR))
        return Source(NAME, embedded.folder, None), True
    return open_source(recipe.model.id, recipe.model.revision), False


Writing = MatrixStage | CutStage | DistillStage | LoraStage | ExportStage
Open = Choices | Cuts | Ratios | Training | Adapting  # what a plan leaves to be found out


def stages_of(recipe: Recipe) -> list[Writing]:
    """The stages of a recipe that write a model."""
    return [stage for stage in recipe.stages if isinstance(stage, Writing)]


def writing_stage_of(recipe: Recipe) -> Writing | None:
    """The stage of a recipe that writes a model; None: it only evaluates.

    Raises:
        PlanError: there are several.
    """
    stages = stages_of(recipe)
    if len(stages) > 1:
        raise PlanError(
            f"The recipe has {len(stages)} stages that write a model.", hint="`llmshrink run` carries out all of them."
        )
    return stages[0] if stages else None


def plan_of(recipe: Recipe, model: StreamedModel) -> tuple[Work, Plan, Open | None]:
    """What is done; where something is found out by measuring first, one way that may come out, and all of them.

    Raises:
        PlanError: the recipe cannot be carried out on this model.
    """
    stage = writing_stage_of(recipe)
    if stage is None:
        raise PlanError("The recipe only evaluates: there is nothing to plan.")
    refuse_unanswerable(recipe, model)
    choices: Open | None = None
    if isinstance(stage, CutStage):
        choices = Cuts(recipe, stage, model)
        work = choices.work(choices.first(choices.shapes[0]))
    elif isinstance(stage, DistillStage):
        choices = Training(recipe, stage, model)
        work = choices.guess
    elif isinstance(stage, LoraStage):
        choices = Adapting(recipe, stage, model)
        work = choices.work(model)
    elif isinstance(stage, MatrixStage) and stage.allocate is not None:
        choices = Choices(recipe, stage, model)
        choices.check()
        work = choices.guessed()
    elif isinstance(stage, PruneStage | FactorizeStage) and stage.ratios is not None:
        choices = Ratios(recipe, stage, model)
        work = choices.guess
    elif isinstance(stage, MatrixStage):
        work = resolve(recipe, stage, changeable(stage.transform, model) if stage.transform else model)
    else:
        work = resolve_export(recipe, stage, model)
    return work, planned(recipe, model, work, choices), choices


def adapter_plan(recipe: Recipe, adapting: Adapting) -> Plan:
    """What is learned beside a model that stays as it is.

    Raises:
        PlanError: a gate asks what this run would not measure.
    """
    model = adapting.model
    refuse_unanswerable(recipe, model)
    length = row_length(recipe.evaluation.length, model, [])
    return describe_adapter(
        adapting,
        memory_bytes=planned_adapting(adapting),
        evaluation_bytes=adapted_evaluation(adapting, length) if recipe.evaluation.data else 0,
        max_bytes=size_limit(recipe, model.source.checkpoint.file_bytes),
    )


def planned(recipe: Recipe, model: StreamedModel, work: Work, choices: Open | None) -> Plan:
    """The plan of a work, which is told its economy: how it keeps within the memory there is."""
    work.economy, memory = compress_economy(work, recipe, choices)
    work.events += work.economy.told("compress")
    scratch, evaluation = compress_scratch(work, recipe), 0
    if recipe.evaluation.data:
        length = row_length(recipe.evaluation.length, model, [])
        work.scoring, evaluation = evaluation_economy(model, recipe, length, work.opened_bytes)
        work.events += work.scoring.told("compare both models")
        states = evaluation_states(model, recipe.evaluation.rows, length)
        scratch = max(scratch, states if work.scoring.on_disk else 0)
    limit = size_limit(recipe, model.original.source.checkpoint.file_bytes)
    return describe(
        work, choices, memory_bytes=memory, evaluation_bytes=evaluation, scratch_bytes=scratch, max_bytes=limit
    )
