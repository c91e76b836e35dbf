"""From a stage that trains through rounding to the grid it goes through, and the work of writing what it learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from llmshrink.errors import PlanError
from llmshrink.forms import Dense, Form, Quantized
from llmshrink.io import safetensors
from llmshrink.methods.base import Method
from llmshrink.methods.grid import GridConfig
from llmshrink.methods.qat import Qat
from llmshrink.model.anatomy import Matrix
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.layout import default_output, lay_out
from llmshrink.plan.resolve import resolve
from llmshrink.plan.work import Work
from llmshrink.recipe.qat import QatSpec
from llmshrink.recipe.schema import EvaluationSpec, Recipe

CODES = "codes.safetensors"  # beside what else was learned: for each rounded parameter its codes and tables


def plan_rounding(recipe: Recipe, spec: QatSpec, model: StreamedModel) -> Work:
    """The work of rounding a student as it is: what training starts from, and as large as what it ends with.

    Raises:
        PlanError: it cannot be rounded so, or what is stored says no scales that could be learned.
    """
    name, bits = spec.method.name, spec.method.settings.get("bits", 4)
    output = recipe.output or str(default_output(model.source.id, f"qat-w{bits}"))
    work = resolve(recipe.model_copy(update={"output": output}), spec.stage, model)
    if experts := [m.name for m in work.methods if m.site.expert is not None]:
        raise PlanError(
            f"{experts[0]}: experts that are one tensor in memory are not trained through rounding.",
            hint="Leave them out with `qat.ignore`, or quantize without --qat (--preset best learns their codes).",
        )
    scaled = work.scale_shapes
    unlike = [
        m.name for m, method in work.methods.items() if m not in scaled or not isinstance(method.config, GridConfig)
    ]
    if unlike:
        raise PlanError(
            f"{unlike[0]}: {name}, written as {work.format.name}, stores no even grid of integer codes under one table "
            "of scales, which is what is learned.",
            hint="Choose method gptq, rtn or hqq, and format compressed-tensors, gptq or awq; `llmshrink export --to "
            "dense` opens the result.",
        )
    return work


def rounded_recipe(recipe: Recipe, spec: QatSpec, folder: Path, student: Path | None) -> Recipe:
    """The recipe that rounds a student into a folder; `student` is where it lies, None: it is the model."""
    changes: dict[str, Any] = {
        "stages": [spec.stage],
        "evaluation": EvaluationSpec(data=[], speed=False),
        "output": str(folder),
    }
    if student is not None:
        changes["model"] = recipe.model.model_copy(update={"id": str(student), "revision": None})
    return recipe.model_copy(update=changes)


def work_of_codes(recipe: Recipe, spec: QatSpec, model: StreamedModel) -> Work:
    """The work of writing what was learned: `model` holds it, and beside it lie the codes of what is rounded."""
    start = plan_rounding(recipe, spec, model)
    learned = safetensors.Checkpoint(model.source.folder, safetensors.read_header(model.source.folder / CODES))
    methods: dict[Matrix, Method[Any]] = {
        m: Qat(partial(_form, m.parameter, start.form(m).weight, learned.get), method.scales)
        for m, method in start.methods.items()
    }
    output = recipe.model_copy(update={"output": str(start.output)})
    return lay_out(output, model, start.format, methods, {}, start.left, [])


def _form(parameter: str, like: Form, get: Callable[[str], Tensor]) -> Quantized:
    assert isinstance(like, Quantized)
    codes, scale = (get(f"{parameter}.{table}") for table in ("codes", "scale"))
    return replace(like, codes=codes, scale=Dense(scale), zero=None if like.zero is None else get(f"{parameter}.zero"))
