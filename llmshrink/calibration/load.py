"""From a recipe's words (`auto`, `self`, a file, a dataset) to token rows; what had to be chosen becomes an event."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

from llmshrink.calibration.rows import Rows, tokenize
from llmshrink.calibration.sample import fits, sample_rows
from llmshrink.calibration.text import documents
from llmshrink.errors import PlanError
from llmshrink.forms import Event
from llmshrink.model.streamed import StreamedModel
from llmshrink.progress import Progress
from llmshrink.recipe.schema import CalibrationSpec, EvaluationSpec

GENERAL_TEXT = "Salesforce/wikitext:wikitext-2-raw-v1"  # what `auto` means where there is a network
AUTO_SELF_TOKENS = 16_384  # sampled for the evaluation that a recipe leaves to `auto`
HUB_SECONDS = 3.0
SELF_EVALUATION_SEED = 1_000_003  # so that no sample for calibration is evaluated


class TextLoader:
    """Makes the rows of one run."""

    def __init__(self, model: StreamedModel, *, embedded: bool, progress: Progress) -> None:
        self._model, self._embedded, self._progress = model, embedded, progress
        self.events: list[Event] = []

    def calibration(self, spec: CalibrationSpec, length: int) -> Rows:
        """Rows for the methods."""
        split, column = spec.split or "train", spec.column
        if spec.data == "auto":
            split, column = "train", None
        data = self.source(spec.data, "calibrated")
        return self._rows(data, split, column, spec.samples, length, spec.seed, spec.packed)

    def source(self, data: str, used: str) -> str:
        """Which text a name means; `used` says in an event what became of what `auto` had to choose."""
        if data != "auto":
            return data
        if self._embedded:
            return "generator"
        if _hub_answers():
            return GENERAL_TEXT
        if not self._model.task.causal:
            message = f"{used} on the built-in stories: no text was given and the Hub cannot be reached"
            self.events.append(Event("generator_calibration", message))
            return "generator"
        message = f"{used} on the model's own samples: no text was given and the Hub cannot be reached"
        self.events.append(Event("self_calibration", message))
        return "self"

    def samples(self, count: int, length: int, seed: int, split: str = "train") -> Rows:
        """Rows that the model itself says; those for another split are others."""
        if not self._model.task.causal:
            raise PlanError(
                f"{self._model.source.id} cannot be sampled from: it predicts no next token.",
                hint="Give text in place of `self`: a file, a dataset id, or `generator`, the built-in stories.",
            )
        shift = 0 if split == "train" else SELF_EVALUATION_SEED
        return sample_rows(self._model, rows=count, length=length, seed=seed + shift, progress=self._progress)

    def evaluation(self, spec: EvaluationSpec, length: int, calibration: Rows | None) -> list[Rows]:
        """Rows of each text to evaluate on."""
        names: list[str] = []
        for name in spec.data:
            names += self._auto_texts() if name == "auto" else [name]
        texts = []
        for name in dict.fromkeys(names):
            count = spec.rows
            if name == "self" and "auto" in spec.data:  # nobody asked for hours of sampling
                count = min(count, max(1, AUTO_SELF_TOKENS // length))
            rows = self._rows(name, spec.split or "test", spec.column, count, length, 0, spec.packed)
            if calibration is not None and (found := _overlap(calibration, rows)):
                self.events.append(found)
            texts.append(rows)
        return texts

    def _auto_texts(self) -> list[str]:
        text = "generator" if self._embedded or not _hub_answers() else GENERAL_TEXT
        if not self._model.task.causal:
            return [text]
        if fits(self._model):
            return [text, "self"]
        self.events.append(Event("not_measured", "quality on the model's own samples: it does not fit into memory"))
        return [text]

    def _rows(
        self, data: str, split: str, column: str | None, count: int, length: int, seed: int, packed: bool
    ) -> Rows:
        if data == "self":
            return self.samples(count, length, seed, split)
        found = documents(data, seed=seed, split=split, column=column)
        tokenizer, encoder = self._model.source.tokenizer, not self._model.task.causal
        rows = tokenize(found, tokenizer, rows=count, length=length, packed=packed, data=data, encoder=encoder)
        if len(rows.tokens) < count:
            message = f"{data} gives {len(rows.tokens)} rows where {count} were asked for"
            self.events.append(Event("few_rows", message, data={"rows": float(len(rows.tokens))}))
        return replace(rows, origin=origin(data, split), split=split)


def origin(data: str, split: str) -> str:
    """Where a text comes from, as people read it in the card: without a path of this machine."""
    if data == "generator":
        return f"the built-in story generator, {split} split"
    return Path(data).name if Path(data).exists() else data


def _overlap(calibration: Rows, rows: Rows) -> Event | None:
    """What the two have in common."""
    seen = {row.numpy().tobytes() for row in calibration.tokens}
    same = any(row.numpy().tobytes() in seen for row in rows.tokens)
    return related("calibration", (calibration.data, calibration.split), rows, same=same)


def related(what: str, source: tuple[str, str], rows: Rows, *, same: bool) -> Event | None:
    """What a text that is evaluated has in common with one that the result was made with.

    The generator's splits share no story, nor do the model's samples.

    Args:
        what: the other is, in a word.
        source: its name and its split.
        rows: of what is evaluated.
        same: whether the same tokens were found in both.
    """
    data, split = source
    if data == rows.data and data not in ("generator", "self"):
        if split != rows.split and not same and not Path(data).exists():
            return Event("related_corpus", f"{what} and evaluation come from two splits of one dataset: {rows.data}")
        same = True
    message = (
        f"{what} and evaluation share a text: {origin(rows.data, rows.split)}. The figures on it flatter the result"
    )
    return Event("shared_corpus", message) if same else None


@cache
def _hub_answers() -> bool:
    """Whether the Hub can be reached: asked once, without the retries that its client would spend on it."""
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception:  # noqa: BLE001 - any failure of the network means no
        return False
    return True
