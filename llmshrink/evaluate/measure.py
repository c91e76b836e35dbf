"""Everything measured of a model before and after: quality on each text, sizes, load time, speed, memory, a sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch

from llmshrink.calibration.rows import Rows
from llmshrink.engine.budget import LIBRARIES
from llmshrink.errors import InputError, ResourceError
from llmshrink.evaluate.reader import Found, ReadRequest, measure
from llmshrink.evaluate.texts import score_texts
from llmshrink.formats.runtimes import missing_packages
from llmshrink.forms import Event
from llmshrink.memory import available_memory, memory_error, release
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.economy import Economy
from llmshrink.progress import Progress
from llmshrink.recipe.schema import Recipe
from llmshrink.report.schema import ModelMeasure, TextScore

ROOM = 1.5  # memory a reader needs while loading and running, as a multiple of the dense weights
PROMPT = 16  # tokens

Pair: TypeAlias = tuple[list[TextScore], list[TextScore]]
Score: TypeAlias = Callable[[StreamedModel, StreamedModel | None, Economy], Pair]


def measure_models(
    recipe: Recipe,
    models: dict[str, StreamedModel],
    texts: list[Rows],
    events: list[Event],
    progress: Progress,
    *,
    economy: Economy,
    folder: Path,
) -> dict[str, ModelMeasure]:
    """Measure one model, or the original and what it became.

    Args:
        recipe: what to measure and how.
        models: by label; the first is the original, the second (if any) is compared with it.
        texts: rows of each evaluation text; none: quality is not measured.
        events: gets an entry for what could not be measured.
        progress: told of the steps.
        economy: how much is in memory at a time while texts are scored.
        folder: for hidden states, where the economy keeps them on disk.
    """

    def score(base: StreamedModel, compared: StreamedModel | None, economy: Economy) -> Pair:
        packed = recipe.evaluation.packed
        return score_texts(base, compared, texts, packed=packed, economy=economy, folder=folder, progress=progress)

    scores = _scores(score, list(models.values()), economy, events) if texts else [[] for _ in models]
    prompt = texts[0].tokens[0][:PROMPT].tolist() if texts else None
    readings = [_read(m, prompt, events, progress) if recipe.evaluation.speed else None for m in models.values()]
    return {
        label: _measure(label, model, reading, score)
        for (label, model), reading, score in zip(models.items(), readings, scores, strict=True)
    }


def _scores(score: Score, models: list[StreamedModel], economy: Economy, events: list[Event]) -> list[list[TextScore]]:
    """Scores of each model. Where both cannot be scored, those of the original alone: compression took hours, it stays.

    Raises:
        InputError: the only model cannot be scored.
        ResourceError: not enough memory to score the only model.
    """
    base, others = models[0], models[1:]
    for compared in dict.fromkeys([*others, None]):
        try:
            return list(_score_in_memory(score, base, compared, economy, events))[: len(models)]
        except (InputError, ResourceError) as error:
            if not others:
                raise
            what = "of the result" if compared else "of the original"
            events.append(Event("not_measured", f"quality {what}: {error}"))
    return [[] for _ in models]


def _score_in_memory(
    score: Score, base: StreamedModel, compared: StreamedModel | None, economy: Economy, events: list[Event]
) -> Pair:
    """Score with ever smaller batches where memory runs out.

    Raises:
        ResourceError: it runs out with the smallest too.
    """
    for smaller in economy.thriftier(row=1, statistics=0, batches=True):
        try:
            return score(base, compared, smaller)
        except (MemoryError, RuntimeError) as error:
            if not memory_error(error):
                raise
        release(base.device)
        events.append(
            Event("out_of_memory", f"memory ran out while {smaller.batch_tokens} tokens at a time were scored")
        )
    raise ResourceError("Memory ran out, however few tokens were scored at a time.")


def _read(model: StreamedModel, prompt: list[int] | None, events: list[Event], progress: Progress) -> Found | None:
    """Load the folder as its users do and time it; None, with an event, where it cannot be done here."""
    folder = model.source.folder
    if missing := missing_packages(model.weights.format.name):
        message = f"speed: transformers needs {' and '.join(missing)} to load {folder}"
        events.append(Event("not_measured", message))
        return None
    needed = 2 * LIBRARIES + int(ROOM * model.dense_bytes)
    if model.device.type == "cpu" and needed > available_memory():
        events.append(Event("not_measured", f"speed: {needed / 2**30:.1f} GiB needed to load {folder} as a whole"))
        return None
    progress.start(f"time {'the result' if model.weights.compressed else 'the model'}", 0)
    request = ReadRequest(folder=str(folder), prompt=prompt, speed=True, device=str(model.device))
    result = measure([request])[0]
    progress.finish()
    if result.found is None:
        events.append(Event("not_measured", f"speed: {result.error}"))
    return result.found


def _measure(label: str, model: StreamedModel, found: Found | None, scores: list[TextScore]) -> ModelMeasure:
    checkpoint = model.source.checkpoint
    parameters = model.parameters
    sample: dict[str, Any] = {}
    if found is not None:
        sample = {
            "loaded_bytes": found.loaded_bytes,
            "load_seconds": found.load_seconds,
            "prefill_tokens_per_second": found.prefill_tokens_per_second,
            "decode_tokens_per_second": found.decode_tokens_per_second,
            "peak_memory_bytes": found.peak_bytes,
            "sample": found.sample,
        }
    return ModelMeasure(
        label=label,
        parameters=parameters,
        zeros=sum(_zeros(model.weights.get(key)) for key in model.weights.infos if key not in model.anatomy.unused),
        tensor_bytes=checkpoint.bytes,
        bits_per_weight=8 * checkpoint.bytes / parameters,
        scores=scores,
        **sample,
    )


def _zeros(tensor: torch.Tensor) -> int:
    return tensor.numel() - int(torch.count_nonzero(tensor))
