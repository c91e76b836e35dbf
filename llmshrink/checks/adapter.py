"""Proof that an adapter on disk is the one that learned: read by plain peft, in another process, beside its model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llmshrink.checks.written import OUTPUT_TOLERANCE, ROOM
from llmshrink.engine.budget import LIBRARIES
from llmshrink.evaluate.reader import ReadRequest, measure
from llmshrink.io.safetensors import Checkpoint
from llmshrink.memory import available_memory
from llmshrink.report.schema import Check


def check_tensors(adapter: Checkpoint, planned: int, *, at_most: bool) -> Check:
    """Whether an adapter holds as many bytes as were planned, all of them numbers."""
    broken = [key for key in adapter.infos if not bool(torch.isfinite(adapter.get(key)).all())]
    right = adapter.bytes <= planned if at_most else adapter.bytes == planned
    detail = f"{len(adapter.infos)} tensors, {adapter.bytes:,} bytes, as planned"
    if not right:
        detail = f"{adapter.bytes:,} bytes of tensors, planned {planned:,}"
    if broken:
        detail = f"not finite: {', '.join(broken[:3])}"
    return Check(name="decode", passed=right and not broken, detail=detail)


def check_adapter(
    base: Path,
    adapter: Path,
    tokens: Tensor,
    learned: Tensor,
    *,
    room: int,
    nested: bool | None = None,
    classes: int | None = None,
) -> Check:
    """Load model and adapter anew, compute in float32, and compare with what the model gave out that had learned.

    Args:
        base: the folder of the model beside which it stands.
        adapter: its folder.
        tokens: ids [rows, length].
        learned: logits [rows, length, vocabulary] that are meant.
        room: bytes of the model in float32.
        classes: how many it tells apart; None: it predicts tokens.
        nested: read the model as NF4, with scales in 8 bits or not; None: as it is stored.
    """
    needed = 2 * LIBRARIES + ROOM * room
    if needed > available_memory():
        return Check(name="reader", passed=None, detail="the model does not fit into memory a second time here")
    request = ReadRequest(
        folder=str(base), tokens=tokens.tolist(), dtype="float32", adapter=str(adapter), nested=nested, classes=classes
    )
    result = measure([request])[0]
    if result.found is None or result.output is None:
        passed = None if result.unable else False
        return Check(name="reader", passed=passed, detail=result.error or "no output came back")
    difference = float((result.output - learned).abs().max())
    limit = OUTPUT_TOLERANCE * max(1.0, float(learned.std()))
    detail = f"peft ({result.found.class_name}): max |difference| of logits {difference:.2e}, allowed {limit:.0e}"
    return Check(name="reader", passed=difference <= limit, detail=detail, value=difference)
