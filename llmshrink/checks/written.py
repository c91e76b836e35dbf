"""Proof that a written folder is what the run says: hashes, every tensor decoded, blocks run, a foreign reader."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llmshrink.engine.budget import LIBRARIES
from llmshrink.engine.hidden import Hidden
from llmshrink.evaluate.reader import ReadRequest, measure
from llmshrink.formats.runtimes import Stored, entry, missing_packages
from llmshrink.forms import LIMITS, InputScheme, relative_error_of
from llmshrink.gguf.checkpoint import GgufCheckpoint
from llmshrink.io.files import has_hash
from llmshrink.memory import available_memory
from llmshrink.model.anatomy import Block, Matrix
from llmshrink.model.streamed import HEAD_ROWS, Decoded, StreamedModel
from llmshrink.report.schema import Check, LayerReport

ROOM = 1.2  # what a reader needs to load a model in float32, as a multiple of its weights
PROBE_ROWS, PROBE_LENGTH, PROBE_SEED = 2, 48, 20_240
OUTPUT_TOLERANCE = 1e-4  # of a reader that computes in float32, for an output with a spread of one
CLEARLY = 0.8  # of the distance to what is not meant
ERROR_TOLERANCE = 1e-7  # between a layer's error as it was compressed and as it was read back


def probe_tokens(model: StreamedModel) -> Tensor:
    """Rows of seeded random token ids that go through every run beside the calibration rows: int64 [2, length]."""
    length = min(PROBE_LENGTH, model.positions or PROBE_LENGTH)
    generator = torch.Generator().manual_seed(PROBE_SEED)
    return torch.randint(0, model.vocabulary, (PROBE_ROWS, length), generator=generator)


def streamed_output(model: StreamedModel, tokens: Tensor) -> Tensor:
    """What a folder gives out [rows, length, width], block by block."""
    hidden = Hidden(model, [tokens])
    for block in model.anatomy.blocks:
        model.load_block(block.index)
        hidden.advance(block.index)
        model.drop_block(block.index)
    with torch.no_grad():
        return model.output(tokens, hidden.states[0])


@torch.no_grad()
def output_as_read(model: StreamedModel, tokens: Tensor, *, rounded: bool = True) -> Tensor:
    """What transformers gives out [rows, length, width] for a folder, computed the way its reader does.

    With the weights that transformers holds, a row at a time, with all cores: sums in another order could round inputs
    the other way, which later layers make more of. `rounded`: inputs are rounded where transformers rounds them.
    """
    rows = torch.split(tokens, 1)
    hidden = Hidden(model, list(rows))
    for block in model.anatomy.blocks:
        model.load_block(block.index, _as_read(model, block, rounded))
        hidden.states = [hidden.run(block.index, row) for row in range(len(rows))]
        model.drop_block(block.index)
    return torch.cat([model.output(row, state) for row, state in zip(rows, hidden.states, strict=True)])


def _as_read(model: StreamedModel, block: Block, rounded: bool) -> dict[str, Decoded]:
    def read(matrix: Matrix) -> Tensor:
        return matrix.seen(model.weights.as_read(matrix.key, matrix.kind))

    found = {}
    for matrix in block.matrices:
        if matrix.key in model.weights.compressed:
            scheme = model.weights.input_as_read(matrix.key, matrix.kind) if rounded else None
            as_read = _InputAsRead(scheme.kind, scheme.scale) if scheme and scheme.kind in LIMITS else scheme
            found[matrix.key] = Decoded(partial(read, matrix), as_read)
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


def check_layers(
    source: StreamedModel,
    written: StreamedModel,
    layers: list[LayerReport],
    tuned: Mapping[str, Tensor],
    fitted: Container[str] = (),
) -> list[Check]:
    """Decode every compressed matrix and compare its error with the report.

    The rest must equal the source, or what `tuned` has by its name; but for vectors that are `fitted`, which only the
    blocks' outputs can prove.
    """

    def meant(key: str) -> Tensor:
        return tuned[key] if key in tuned else source.weights.dense(key)

    by_name = {layer.name: layer for layer in layers}
    worst, worst_name = 0.0, ""
    for matrix in source.anatomy.matrices:
        if (layer := by_name.get(matrix.name)) is None or layer.relative_error is None:
            continue
        stretches = zip(*(_stretches(model, matrix) for model in (source, written)), strict=True)
        off = abs(relative_error_of(stretches) - layer.relative_error)
        if not off < worst:  # NaN is the worst
            worst, worst_name = off, matrix.name
    same = worst <= ERROR_TOLERANCE
    decode = Check(
        name="decode",
        passed=same,
        detail=f"{len(layers)} layers decoded from disk" if same else f"{worst_name}: not what was compressed",
        value=worst,
    )
    checkpoint = written.source.checkpoint
    dropped, add = (_left_out(source), checkpoint.norms_add) if isinstance(checkpoint, GgufCheckpoint) else ((), 0.0)
    if source.anatomy.embedding is not None and source.anatomy.embedding.name in by_name:
        dropped = (*dropped, *source.anatomy.copies)
    others = (k for k in source.weights.infos if k not in dropped and k not in fitted)
    left = [k for k in others if k.removesuffix(".weight") not in by_name]
    changed = [k for k in left if k not in written.weights.infos or not _equal(meant(k), written.weights.get(k), add)]
    learned = sum(key in tuned for key in left)
    equal = f"{len(left) - learned} other tensors equal the source's" + (f", {learned} are tuned" if learned else "")
    detail = equal if not changed else f"differ: {', '.join(changed[:3])}"
    return [decode, Check(name="copied", passed=not changed, detail=detail)]


def _left_out(source: StreamedModel) -> tuple[str, ...]:
    """Tensors on disk that a GGUF file has no place for: those of no parameter, a copy of the tied embedding."""
    return (*source.anatomy.unused, *source.anatomy.copies)


def _stretches(model: StreamedModel, matrix: Matrix) -> Iterator[Tensor]:
    """A matrix as float32: those of blocks at once, in the disk's order; larger ones a stretch of rows at a time."""
    if matrix not in (model.anatomy.embedding, model.anatomy.head):
        yield model.weights.get(matrix.key).float()
        return
    rows = model.weights.rows(matrix.key)
    for start in range(0, matrix.shape[0], HEAD_ROWS):
        yield rows(slice(start, start + HEAD_ROWS)).float()


def _equal(original: Tensor, copy: Tensor, add: float) -> bool:
    """Whether a copy has the same values, where the file holds what both are with `add`.

    It may have 16 bits in 32, as GGUF has its vectors.
    """
    wider = copy.dtype == torch.float32 and original.dtype in (torch.bfloat16, torch.float16)
    if original.dtype == copy.dtype and torch.equal(original, copy):
        return True
    return (wider or bool(add)) and torch.equal(original.float() + add, copy.float() + add)


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
    kind = Stored(written.weights.format.name, frozenset(), model_type=written.source.config.model_type)
    if (known := entry(kind, "transformers")).support == "no":
        return Check(name="reader", passed=None, detail=f"transformers cannot load it: {known.reason}")
    needed = 2 * LIBRARIES + ROOM * written.parameters * 4 + written.source.checkpoint.bytes
    if needed > available_memory():
        return Check(name="reader", passed=None, detail="the dense model does not fit into memory here")
    expected = output_as_read(written, tokens)
    check, output = _read(written, tokens, expected, unused)
    if check.passed is not False or output is None or not written.weights.rounds_inputs:
        return check
    # Sums in another order round some inputs the other way, and every layer makes more of it: one number in a small
    # encoder may become half of what rounding itself does. So the weights are compared without rounding, and with it
    # the reader must be clearly nearer to rounded inputs than to exact ones, where one that does not round would be.
    exact = output_as_read(written, tokens, rounded=False)
    near, far = ((output - one).square().mean().sqrt() for one in (expected, exact))
    alike, _ = _read(written, tokens, exact, unused, rounded=False)
    detail = f"{alike.detail}, inputs not rounded; rounded, it differs by {near:.2e}, and by {far:.2e} from exact ones"
    return alike.model_copy(update={"passed": alike.passed and bool(near <= CLEARLY * far), "detail": detail})


def _read(
    written: StreamedModel, tokens: Tensor, expected: Tensor, unused: tuple[str, ...], *, rounded: bool = True
) -> tuple[Check, Tensor | None]:
    """Whether the reader finds a place for every tensor and gives out what is expected; and what it gives out."""
    request = ReadRequest(
        folder=str(written.source.folder), tokens=tokens.tolist(), dtype="float32", round_inputs=rounded
    )
    result = measure([request])[0]
    if result.found is None or result.output is None:
        passed = None if result.unable else False
        return Check(name="reader", passed=passed, detail=result.error or "no output came back"), None
    if keys := result.found.misplaced((*unused, *written.map.absent)):
        detail = f"missing, unexpected or mismatched tensors: {', '.join(keys[:3])}"
        return Check(name="reader", passed=False, detail=detail, value=float(len(keys))), None
    difference = float((result.output - expected).abs().max())
    limit = OUTPUT_TOLERANCE * max(1.0, float(expected.std()))
    detail = (
        f"transformers ({result.found.class_name}): max |difference| of {written.task.gives} {difference:.2e}, "
        f"allowed {limit:.0e}"
    )
    return Check(name="reader", passed=difference <= limit, detail=detail, value=difference), result.output
