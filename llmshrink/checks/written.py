"""Proof that a written folder is what the run says: hashes, every tensor decoded, blocks run, a foreign reader."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llmshrink.engine.budget import LIBRARIES
from llmshrink.engine.hidden import Hidden
from llmshrink.evaluate.reader import ReadRequest, measure
from llmshrink.formats.runtimes import missing_packages
from llmshrink.forms import InputScheme, relative_error
from llmshrink.io.files import has_hash
from llmshrink.memory import available_memory
from llmshrink.model.anatomy import Block, Matrix
from llmshrink.model.streamed import Decoded, StreamedModel
from llmshrink.report.schema import Check, LayerReport

ROOM = 1.2  # what a reader needs to load a model in float32, as a multiple of its weights
PROBE_ROWS, PROBE_LENGTH, PROBE_SEED = 2, 48, 20_240
OUTPUT_TOLERANCE = 1e-4  # of a reader that computes in float32, for an output with a spread of one
ERROR_TOLERANCE = 1e-7  # between a layer's error as it was compressed and as it was read back


def probe_tokens(model: StreamedModel) -> Tensor:
    """Rows of seeded random token ids that go through every run beside the calibration rows: int64 [2, length]."""
    length = min(PROBE_LENGTH, model.positions or PROBE_LENGTH)
    generator = torch.Generator().manual_seed(PROBE_SEED)
    return torch.randint(0, model.vocabulary, (PROBE_ROWS, length), generator=generator)


def streamed_output(model: StreamedModel, tokens: Tensor, *, as_read: bool = False) -> Tensor:
    """What a folder gives out [rows, length, width], block by block; `as_read`: with the weights transformers holds."""
    batches = list(torch.split(tokens, 1)) if as_read else [tokens]  # the reader takes one row at a time
    hidden = Hidden(model, batches)
    for block in model.anatomy.blocks:
        model.load_block(block.index, _as_read(model, block) if as_read else None)
        hidden.advance(block.index)
        model.drop_block(block.index)
    with torch.no_grad():
        return torch.cat([model.output(rows, state) for rows, state in zip(batches, hidden.states, strict=True)])


def _as_read(model: StreamedModel, block: Block) -> dict[str, Decoded]:
    def read(matrix: Matrix) -> Tensor:
        return matrix.seen(model.weights.as_read(matrix.key, matrix.kind))

    found = {}
    for matrix in block.matrices:
        if matrix.key in model.weights.compressed:
            scheme = model.weights.input_as_read(matrix.key, matrix.kind)
            found[matrix.key] = Decoded(
                partial(read, matrix), None if scheme is None else _InputAsRead(scheme.kind, scheme.scale)
            )
    return found


class _InputAsRead(InputScheme):
    """compressed-tensors 0.20 takes two dimensions for rows and positions: a tensor [tokens, in] gets one scale."""

    def round(self, x: Tensor) -> Tensor:
        return super().round(x.reshape(1, -1)).view(x.shape) if x.ndim == 2 else super().round(x)


def check_hashes(folder: Path, expected: Mapping[str, str]) -> Check:
    """Whether files on disk have the SHA-256 they were written with."""
    wrong = [name for name, digest in expected.items() if not has_hash(folder / name, digest)]
    detail = f"{len(expected)} files re-read" if not wrong else f"changed or missing: {', '.join(sorted(wrong)[:3])}"
    return Check(name="hashes", passed=not wrong, detail=detail)


def check_layers(source: StreamedModel, written: StreamedModel, layers: list[LayerReport]) -> list[Check]:
    """Decode every compressed matrix and compare its error with the report; the rest must equal the source."""
    by_name = {layer.name: layer for layer in layers}
    worst, worst_name = 0.0, ""
    for block in source.anatomy.blocks:
        for matrix in block.matrices:
            if (layer := by_name.get(matrix.name)) is None or layer.relative_error is None:
                continue
            original, decoded = source.weights.get(matrix.key).float(), written.weights.get(matrix.key).float()
            off = abs(relative_error(original, decoded) - layer.relative_error)
            if not off < worst:  # NaN is the worst
                worst, worst_name = off, matrix.name
    same = worst <= ERROR_TOLERANCE
    decode = Check(
        name="decode",
        passed=same,
        detail=f"{len(layers)} layers decoded from disk" if same else f"{worst_name}: not what was compressed",
        value=worst,
    )
    left = [key for key in source.weights.infos if key.removesuffix(".weight") not in by_name]
    changed = [
        k
        for k in left
        if k not in written.weights.infos or not _equal(source.weights.dense(k), written.weights.dense(k))
    ]
    detail = f"{len(left)} other tensors equal the source's" if not changed else f"differ: {', '.join(changed[:3])}"
    return [decode, Check(name="copied", passed=not changed, detail=detail)]


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def check_blocks(written: StreamedModel, tokens: Tensor, ends: Tensor) -> Check:
    """Run the written blocks on the probe rows and compare the output with that of the engine's own last states."""
    with torch.no_grad():
        engine = written.output(tokens, ends)
    difference = float((streamed_output(written, tokens) - engine).abs().max())
    limit = OUTPUT_TOLERANCE * max(1.0, float(engine.std()))
    detail = f"max |difference| of {written.task.gives} {difference:.2e}, allowed {limit:.0e}"
    return Check(name="blocks", passed=difference <= limit, detail=detail, value=difference)


def check_reader(written: StreamedModel, tokens: Tensor, unused: tuple[str, ...]) -> Check:
    """Load a folder with plain transformers in another process, computing in float32, and compare its output.

    `unused` names tensors that no parameter takes in the source either (GPT-2's masks): they are copied all the same.
    """
    if missing := missing_packages(written.weights.format.name):
        detail = f"transformers needs {' and '.join(missing)} for this format: not installed here"
        return Check(name="reader", passed=None, detail=detail)
    needed = 2 * LIBRARIES + ROOM * written.parameters * 4 + written.source.checkpoint.bytes
    if needed > available_memory():
        return Check(name="reader", passed=None, detail="the dense model does not fit into memory here")
    expected, folder = streamed_output(written, tokens, as_read=True), written.source.folder
    result = measure([ReadRequest(folder=str(folder), tokens=tokens.tolist(), dtype="float32")])[0]
    if result.found is None or result.output is None:
        return Check(
            name="reader", passed=None if result.unable else False, detail=result.error or "no output came back"
        )
    if keys := result.found.misplaced((*unused, *written.map.absent)):
        detail = f"missing, unexpected or mismatched tensors: {', '.join(keys[:3])}"
        return Check(name="reader", passed=False, detail=detail, value=float(len(keys)))
    difference = float((result.output - expected).abs().max())
    limit = OUTPUT_TOLERANCE * max(1.0, float(expected.std()))
    detail = (
        f"transformers ({result.found.class_name}): max |difference| of {written.task.gives} {difference:.2e}, "
        f"allowed {limit:.0e}"
    )
    return Check(name="reader", passed=difference <= limit, detail=detail, value=difference)
