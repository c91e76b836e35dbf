"""From the work to the plan that people read."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from llmshrink.formats.runtimes import RUNTIMES, Runtime, Stored, entry
from llmshrink.io.files import nearest
from llmshrink.model.anatomy import Matrix
from llmshrink.plan.loading import stored
from llmshrink.plan.schema import BlockPlan, LayerPlan, LoadPlan, Plan, PlanEvent, TensorPlan
from llmshrink.plan.work import Work, main_method, method_name


def describe(
    work: Work, *, memory_bytes: int, evaluation_bytes: int, scratch_bytes: int, max_bytes: int | None
) -> Plan:
    """The plan as data.

    Args:
        work: what is done.
        memory_bytes: that the compress step takes.
        evaluation_bytes: that the comparison of both models takes; 0: there is none.
        scratch_bytes: on disk beside the output, until the run ends.
        max_bytes: what the recipe allows for all files that hold tensors; None: any size.
    """
    model, infos = work.model, work.model.weights.infos
    blocks, compressed = [], 0
    after = sum(t.numel() * t.itemsize for t in work.meta_others().values())
    for block in model.anatomy.blocks:
        tensors = work.meta_tensors(block)
        after += sum(t.numel() * t.itemsize for t in tensors.values())
        layers = []
        for matrix in block.matrices:
            before = model.weights.stored_bytes(matrix.key)
            method = work.methods.get(matrix)
            if method is None:
                layers.append(_left_plan(matrix, before, infos[matrix.key].bytes, work.left[matrix]))
                continue
            layer = work.form(matrix)
            packed = work.format.pack(work.slots[matrix], layer)
            compressed += matrix.numel
            layers.append(
                LayerPlan(
                    name=matrix.name,
                    shape=matrix.shape,
                    parameters=matrix.numel,
                    method=method_name(method),
                    bits=getattr(layer.weight, "bits", None),
                    group_size=getattr(method.config, "group_size", getattr(method.config, "block_size", None)),
                    bytes_before=before,
                    bytes_after=sum(t.numel() * t.itemsize for t in packed.values()),
                    reason=None,
                )
            )
        blocks.append(BlockPlan(index=block.index, layers=layers))
    inside = {m.key for b in model.anatomy.blocks for m in b.matrices}
    others = [
        TensorPlan(name=k, bytes_before=model.weights.stored_bytes(k), bytes_after=i.bytes, parameters=i.numel)
        for k, i in sorted(infos.items())
        if k not in inside
    ]
    parameters = model.parameters
    first = main_method(work.methods)
    return Plan(
        model=model.source.id,
        architecture=type(model.model).__name__,
        method=method_name(first),
        format=work.format.name,
        blocks=blocks,
        others=others,
        parameters=parameters,
        parameters_compressed=compressed,
        bytes_before=model.source.checkpoint.bytes,
        bytes_after=after,
        file_bytes=work.file_bytes,
        max_bytes=max_bytes,
        bits_per_weight=8 * after / parameters,
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


def _left_plan(matrix: Matrix, before: int, after: int, reason: str) -> LayerPlan:
    return LayerPlan(
        name=matrix.name,
        shape=matrix.shape,
        parameters=matrix.numel,
        method=None,
        bits=None,
        group_size=None,
        bytes_before=before,
        bytes_after=after,
        reason=reason,
    )


def _already(output: Path) -> int:
    """Bytes that an unfinished run of this output holds already: they are not needed again."""
    partial = output.with_name(output.name + ".partial")
    total = 0
    for folder, _, names in os.walk(partial):
        for name in names:
            with suppress(FileNotFoundError):  # another run of this output may be at work
                total += (Path(folder) / name).stat().st_size
    return total
