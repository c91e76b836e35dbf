"""From the work to the plan that people read."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from llmshrink.formats.runtimes import RUNTIMES, Runtime, Stored, entry
from llmshrink.forms import quantized
from llmshrink.io.files import nearest
from llmshrink.methods.base import method_name
from llmshrink.model.anatomy import Matrix
from llmshrink.plan.adapting import Adapting
from llmshrink.plan.cache import Keeping
from llmshrink.plan.choices import Choices
from llmshrink.plan.cut import Cuts
from llmshrink.plan.describe_adapter import adapter_part
from llmshrink.plan.loading import stored
from llmshrink.plan.ratios import Ratios
from llmshrink.plan.schema import (
    AllocationPlan,
    BlockPlan,
    CachePlan,
    CutPlan,
    LayerPlan,
    LoadPlan,
    Plan,
    PlanEvent,
    RatiosPlan,
    TensorPlan,
    TrainPlan,
)
from llmshrink.plan.training import Training
from llmshrink.plan.work import Work, main_method


def describe(
    work: Work,
    choices: Choices | Cuts | Ratios | Training | Adapting | None = None,
    *,
    memory_bytes: int,
    evaluation_bytes: int,
    scratch_bytes: int,
    max_bytes: int | None,
) -> Plan:
    """The plan as data.

    Args:
        work: what is done.
        choices: what is chosen by measuring before that, where `work` is one way to meet a size; None: nothing.
        memory_bytes: that the compress step takes.
        evaluation_bytes: that the comparison of both models takes; 0: there is none.
        scratch_bytes: on disk beside the output, until the run ends.
        max_bytes: what the recipe allows for all files that hold tensors; None: any size.
    """
    model, infos = work.model, work.model.weights.infos
    sizes = work.tensor_bytes
    units = choices.units if isinstance(choices, Choices | Ratios) else []
    open_ = {m for unit in units for m in unit.matrices}
    whole = model if work.original is None else work.original.model
    if isinstance(choices, Training | Adapting):
        whole = choices.model
    blocks = [
        BlockPlan(index=block.index, layers=[_layer_plan(work, m, m in open_) for m in block.matrices])
        for block in model.anatomy.blocks
    ]
    ends = (model.anatomy.embedding, model.anatomy.head)
    named = [m for m in ends if m is not None and (m in work.methods or m in work.left)]
    outside = [_layer_plan(work, m, m in open_) for m in named]
    inside = {m.key for m in named} | {m.key for part in work.parts for m in part.matrices}
    others = [
        TensorPlan(name=k, bytes_before=work.bytes_before(k), bytes_after=sizes.get(k, 0), parameters=i.numel)
        for k, i in sorted(infos.items())
        if k not in inside
    ]
    parameters = model.parameters
    first = main_method(work.methods)
    return Plan(
        model=model.source.id,
        architecture=type(model.model).__name__,
        method=_called(choices) or method_name(first),
        format=work.format.name,
        type=work.mix,
        transforms=None if work.transforms is None else work.transforms.words,
        allocation=_allocation(choices) if isinstance(choices, Choices) else None,
        ratios=_ratios(choices) if isinstance(choices, Ratios) else None,
        cut=_cut(work, choices) if isinstance(choices, Cuts) else _cut_before(choices),
        training=_training(choices) if isinstance(choices, Training) else None,
        adapter=adapter_part(choices) if isinstance(choices, Adapting) else None,
        learning_steps=0 if work.reconstruct is None else work.reconstruct.steps,
        tuning_steps=0 if work.tune is None else work.tune.steps,
        blocks=blocks,
        outside=outside,
        others=others,
        parameters=parameters,
        parameters_compressed=sum(matrix.numel for matrix in work.methods),
        bytes_before=whole.source.checkpoint.bytes,
        bytes_after=sum(sizes.values()),
        bytes_are_bound=work.pack,
        file_bytes=work.file_bytes,
        max_bytes=max_bytes,
        bits_per_weight=8 * sum(sizes.values()) / parameters,
        memory_bytes=memory_bytes,
        evaluation_bytes=evaluation_bytes,
        disk_bytes=max(0, sum(work.file_bytes.values()) + scratch_bytes - _already(work.output)),
        disk_free=shutil.disk_usage(nearest(work.output)).free,
        output=str(work.output),
        loads_in=[_load_plan(stored(work), runtime) for runtime in RUNTIMES],
        events=[PlanEvent(kind=e.kind, message=e.message, layer=e.layer) for e in work.events],
    )


def _load_plan(result: Stored, runtime: Runtime) -> LoadPlan:
    found = entry(result, runtime)
    return LoadPlan(runtime=runtime, support=found.support, reason=found.reason, source=found.source)


def _allocation(choices: Choices) -> AllocationPlan:
    return AllocationPlan(
        candidates=choices.candidates,
        units=len(choices.units),
        counted="files" if choices.spec.size is not None else "tensors",
        asked_bytes=choices.limit,
        smallest_bytes=choices.smallest,
        largest_bytes=choices.largest,
    )


def _ratios(ratios: Ratios) -> RatiosPlan:
    return RatiosPlan(name=ratios.spec.name, sparsity=ratios.sparsity, units=len(ratios.units))


def _called(choices: object) -> str | None:
    """What makes the weights, where no method does."""
    return "distill" if isinstance(choices, Training) else choices.name if isinstance(choices, Adapting) else None


def _training(training: Training) -> TrainPlan:
    steps = training.steps
    lottery = training.stage.lottery
    return TrainPlan(
        teacher=training.taught_by,
        steps=steps.limit,
        tokens=steps.per_step * steps.length,
        processes=steps.processes,
        trainings=1 if lottery is None else lottery.rounds + 1,
        cache=None if training.keeping is None else _caching(training.keeping, training.kept_bytes),
    )


def _caching(keeping: Keeping, size: int) -> CachePlan:
    kind = keeping.kind
    return CachePlan(
        method=kind.method,
        tokens=kind.tokens,
        temperature=kind.temperature,
        bytes_per_token=kind.position_bytes,
        bytes=size,
        found=keeping.found is not None,
    )


def _cut_before(choices: Choices | Ratios | Training | Adapting | None) -> CutPlan | None:
    """What is cut out of the model before it learns."""
    if not isinstance(choices, Training) or choices.cuts is None:
        return None
    return _cut(choices.cuts.work(choices.cuts.first(choices.cuts.shapes[0])), choices.cuts)


def _cut(work: Work, cuts: Cuts) -> CutPlan:
    shape = cuts.shapes[0]
    named = shape.named if len(cuts.shapes) == 1 else None
    return CutPlan(
        before=cuts.sizes(),
        kept=cuts.sizes(shape),
        layers=None if named is None else list(named),
        candidates=len(cuts.shapes),
        repaired=0 if work.repair is None else len(work.repair.matrices),
        parameters_before=cuts.model.parameters,
    )


def _layer_plan(work: Work, matrix: Matrix, is_open: bool) -> LayerPlan:
    method = work.methods.get(matrix)
    if method is None:
        layer, config, after = None, None, work.tensor_bytes[matrix.key]
    else:
        layer, config = work.form(matrix), method.config
        after = sum(t.nbytes for t in work.packed(matrix).values())
    return LayerPlan(
        name=matrix.name,
        shape=matrix.shape,
        parameters=matrix.numel,
        method=None if method is None else method_name(method),
        bits=None if layer is None or is_open or (codes := quantized(layer.weight)) is None else codes.bits,
        group_size=None if is_open else getattr(config, "group_size", getattr(config, "block_size", None)),
        type=None if layer is None or is_open else work.format.type_of(layer),
        bytes_before=work.bytes_before(matrix.key),
        bytes_after=after,
        reason=work.left.get(matrix),
        shape_before=_shape_before(work, matrix),
        open=is_open,
    )


def _shape_before(work: Work, matrix: Matrix) -> tuple[int, int] | None:
    """[out, in] of what a matrix was cut out of; None: it is whole."""
    if work.original is None:
        return None
    first, second = work.original.shape(matrix.key)
    shape = (second, first) if matrix.transposed else (first, second)
    return None if shape == matrix.shape else shape


def _already(output: Path) -> int:
    """Bytes that an unfinished run of this output holds already: they are not needed again."""
    partial = output.with_name(output.name + ".partial")
    total = 0
    for folder, _, names in os.walk(partial):
        for name in names:
            with suppress(FileNotFoundError):  # another run of this output may be at work
                total += (Path(folder) / name).stat().st_size
    return total
