"""The plan of an adapter that people read: the model stays as it is, and something small comes to lie beside it."""

from __future__ import annotations

import shutil

from llmshrink.io.files import nearest
from llmshrink.model.anatomy import Matrix
from llmshrink.plan.adapting import Adapting
from llmshrink.plan.schema import AdapterPlan, BlockPlan, LayerPlan, Plan, PlanEvent, TensorPlan
from llmshrink.recipe.adapter import WRITES_MODEL

FORMAT = "peft"  # of an adapter folder
NAME = "adapter_model.safetensors"
OWN = "base/model.safetensors"  # of a model in four bits that comes with it
STATES = 3 * 4  # bytes for each number that learns in a saved state: itself, and two averages
KEPT = 3  # saved states on disk at a time: two, and one that is being written


def describe_adapter(adapting: Adapting, *, memory_bytes: int, evaluation_bytes: int, max_bytes: int | None) -> Plan:
    """The plan as data.

    Args:
        adapting: what learns.
        memory_bytes: that learning takes.
        evaluation_bytes: that measuring takes, with and without what was learned; 0: nothing is measured.
        max_bytes: what the recipe allows for all files that hold tensors; None: any size.
    """
    model, size, output = adapting.model, adapting.size, adapting.output
    infos, before = model.weights.infos, model.source.checkpoint.bytes
    after = (adapting.own_base or before) + size.bytes
    files = {NAME: size.bytes} | ({OWN: adapting.own_base} if adapting.own_base else {})
    inside = {m.key for block in model.anatomy.blocks for m in block.matrices}
    return Plan(
        model=model.source.id,
        architecture=type(model.model).__name__,
        method=adapting.name,
        format=FORMAT,
        type=None,
        transforms=None,
        allocation=None,
        adapter=adapter_part(adapting),
        learning_steps=0,
        tuning_steps=0,
        blocks=[
            BlockPlan(index=b.index, layers=[_layer(adapting, m) for m in b.matrices]) for b in model.anatomy.blocks
        ],
        outside=[],
        others=[
            TensorPlan(name=key, bytes_before=info.bytes, bytes_after=info.bytes, parameters=info.numel)
            for key, info in sorted(infos.items())
            if key not in inside
        ],
        parameters=model.parameters,
        parameters_compressed=0,
        bytes_before=before,
        bytes_after=after,
        bytes_are_bound=size.at_most,
        file_bytes=files,
        max_bytes=max_bytes,
        bits_per_weight=8 * after / model.parameters,
        memory_bytes=memory_bytes,
        evaluation_bytes=evaluation_bytes,
        disk_bytes=size.bytes + 2 * adapting.own_base + KEPT * STATES * size.learns,
        disk_free=shutil.disk_usage(nearest(output)).free,
        output=str(output),
        loads_in=[],
        events=[PlanEvent(kind=e.kind, message=e.message, layer=e.layer) for e in adapting.events],
    )


def adapter_part(adapting: Adapting) -> AdapterPlan:
    """What learns, and how long."""
    size, steps = adapting.size, adapting.steps
    return AdapterPlan(
        name=adapting.name,
        targets=list(adapting.targets),
        learns=size.learns,
        bytes=0 if adapting.name in WRITES_MODEL else size.bytes,
        at_most=size.at_most,
        steps=steps.limit,
        tokens=steps.per_step * steps.length,
    )


def _layer(adapting: Adapting, matrix: Matrix) -> LayerPlan:
    size = adapting.model.weights.infos[matrix.key].bytes if matrix.key in adapting.model.weights.infos else 0
    return LayerPlan(
        name=matrix.name,
        shape=matrix.shape,
        parameters=matrix.numel,
        method=adapting.name if adapting.beside(matrix) else None,
        bits=None,
        group_size=None,
        type=None,
        bytes_before=size,
        bytes_after=size,
        reason=None,
    )
