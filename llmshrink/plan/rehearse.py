"""Whether transformers will load what a plan writes: tried before any compute, with tensors that have no data.

Loaders of quantized checkpoints fail for reasons that no table can hold: a class that initialises a linear's `weight`
which is not there, a rule that joins tensors by name, a module that the loader renames. So the planned names, shapes
and settings go through `from_pretrained` on the `meta` device: a second or less, whatever the size of the model.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from typing import Any

import compressed_tensors  # noqa: F401 - here and not later: a run measures its memory from the level after the imports
import torch
from loguru import logger

from llmshrink.errors import PlanError
from llmshrink.formats.runtimes import missing_packages
from llmshrink.forms import Event
from llmshrink.memory import memory_error
from llmshrink.plan.work import Work

TRIED = ("compressed-tensors", "dense")  # bitsandbytes loads nothing without data


def rehearse(work: Work) -> None:
    """Load the planned files without data; ask for another way of loading where transformers fails with the usual one.

    Raises:
        PlanError: transformers would not load them.
    """
    if work.format.name not in TRIED or missing_packages(work.format.name):
        return
    if (why := _failure(work, work.quantization_config)) is None:
        return
    other = work.format.other_config(work.quantization_config)
    if other is not None and _failure(work, other) is None:
        work.quantization_config = other
        message = "transformers must decompress this model while loading it, and config.json says so"
        if work.inputs:
            message += "; it does not round inputs then"
        work.events.append(Event("loaded_dense", f"{message} ({why})"))
        return
    raise PlanError(
        f"transformers would not load {work.model.source.id} as {work.format.name}: {why}",
        hint="Leave layers that it names out with `ignore`, or choose another --format: dense loads as the model does.",
    )


def _failure(work: Work, config: dict[str, Any] | None) -> str | None:
    """What goes wrong in transformers, or None."""
    tensors = {name: tensor for part in work.parts for name, tensor in work.meta_tensors(part).items()}
    asked = deepcopy(work.model.source.config)
    asked.quantization_config = config
    try:
        with _silence():
            _, info = type(work.model.model).from_pretrained(
                None,
                config=asked,
                state_dict=tensors,
                device_map={"": "meta"},
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told like tensors without a place
            )
    except Exception as error:  # noqa: BLE001 - whatever the loader raises is the answer
        if memory_error(error):
            raise
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    known = {*work.model.anatomy.unused, *work.model.map.absent}
    wrong = [f"{kind.removesuffix('_keys')} {key}" for kind, keys in info.items() for key in keys if key not in known]
    return f"{len(wrong)} tensors have no place there, or are missed: {wrong[0]}" if wrong else None


@contextmanager
def _silence() -> Iterator[None]:
    """Without the progress bars and warnings of the loader: they are about tensors that have no data."""
    logger.disable("compressed_tensors")
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.enable("compressed_tensors")
