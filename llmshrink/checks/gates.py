"""Quality gates: refused before compute where they could not be answered, judged on the report, told at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter

from rich.filesize import decimal

from llmshrink.errors import GateError, PlanError
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.schema import Plan
from llmshrink.recipe.gate import GateSpec
from llmshrink.recipe.schema import Recipe
from llmshrink.recipe.stages import EvalStage
from llmshrink.report.rows import gate_line, text_name
from llmshrink.report.schema import GateReport, ModelMeasure, Report, TextScore

Values = list[tuple[str, float | None]]  # by the names of texts, of which two may be the same
GAIN = 0.01  # a perplexity may fall by this share: rounding is noise, and noise on little text can help
KL_NOISE = 1e-5  # nats: KL is never below 0, but for the rounding of log-softmax in float32
# Events that --strict lets pass: nothing was degraded.
NOTICES = {
    "left_dense",
    "caution",
    "default_method",
    "length_cut",
    "endless_text",
    "unused_tensors",
    "related_corpus",
    "requantized",
    "decompressed",
    "loaded_dense",
    "economy",
    "out_of_memory",
    "work_lost",
    "cached",
    "not_cached",
    "measured_before",
    "target_above",
    "target_below",
    "not_tuned",
    "train_calibration",
    "ratios_bounded",
    "other_tokens",
}


# --- before compute


def refuse_unanswerable(recipe: Recipe, model: StreamedModel) -> None:
    """A gate on something that this run would not measure.

    Raises:
        PlanError: no text, nothing to compare with, or a measure that this kind of model does not have.
    """
    beside = recipe.evaluation.baseline is not None or any(not isinstance(s, EvalStage) for s in recipe.stages)
    for number, stage in enumerate(recipe.stages):
        gate, where = stage.gate, f"stages[{number}].gate"
        relative = ["max_size"] if gate.max_size is not None and gate.max_size.share is not None else []
        if (lonely := gate.quality + relative) and not beside:
            raise PlanError(
                f"{where}: {_and(lonely)} cannot be judged without another model to compare with.",
                hint="Name it with --baseline MODEL (evaluation.baseline).",
            )
        if gate.quality and not recipe.evaluation.data:
            raise PlanError(
                f"{where}: {_and(gate.quality)} cannot be judged without text, and evaluation.data is empty.",
                hint="Give --evaluation auto, or a text of your own (evaluation.data).",
            )
        if unknown := [name for name in gate.quality if name not in _measured(model)]:
            raise PlanError(
                f"{where}: {_and(unknown)} cannot be asked of {type(model.model).__name__}: its {model.task.gives} "
                f"give no {'perplexity' if unknown == ['max_ppl_increase'] else 'such measure'}.",
                hint=f"Gates for it: {_and([*_measured(model), 'max_size'])}.",
            )


def _measured(model: StreamedModel) -> list[str]:
    """The gates on quality for which a kind of model is measured."""
    names = ["max_kl", "min_top1"] if model.distribution else []
    return ["max_ppl_increase", *names] if model.task.causal else names


def _and(names: list[str]) -> str:
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def size_limit(recipe: Recipe, original: int) -> int | None:
    """The smallest `max_size` of any stage in bytes, given the bytes of the original's files; None: there is none."""
    limits = [stage.gate.max_size.of(original) for stage in recipe.stages if stage.gate.max_size is not None]
    return min(limits, default=None)


def check_size(plan: Plan) -> None:
    """Ask `gate.max_size` of a plan whose bytes are exact: nothing need be computed to know that it fails.

    Where they are a bound, what was written is asked alone.

    Raises:
        GateError: the files would be larger.
    """
    size = sum(plan.file_bytes.values())
    if plan.max_bytes is not None and size > plan.max_bytes and not plan.bytes_are_bound:
        raise GateError(
            f"max_size: the files that hold tensors are planned with {size:,} bytes, and {plan.max_bytes:,} are "
            "allowed. Nothing was computed.",
            hint="Choose fewer --bits or a larger --group-size, or allow more.",
        )


# --- on what was measured


@dataclass(frozen=True)
class Outcome:
    """What gates are judged on."""

    measures: Mapping[str, ModelMeasure]  # `before` (the original) and `after`
    original_bytes: int  # of the original's files that hold tensors
    bytes: int  # of the result's
    why: str = ""  # why quality was not measured, if it was not
    learned: bool = False  # the result learned text: it may well be better


def judge(gate: GateSpec, outcome: Outcome) -> list[GateReport]:
    """The verdict on each gate that is asked for; the worst of all texts counts, and what was not measured fails."""
    found = []
    if gate.max_ppl_increase is not None:
        found.append(_increase(gate.max_ppl_increase, outcome))
    if gate.max_kl is not None:
        found.append(_divergence(gate.max_kl, outcome))
    if gate.min_top1 is not None:
        found.append(_worst("min_top1", gate.min_top1, _each(outcome, lambda _, new: new.top1), outcome, sign=-1))
    if gate.max_size is not None:
        limit = gate.max_size.of(outcome.original_bytes)
        part = f"{outcome.bytes / outcome.original_bytes:.1%} of the original's {decimal(outcome.original_bytes)}"
        found.append(
            GateReport(
                name="max_size",
                limit=limit,
                value=outcome.bytes,
                passed=outcome.bytes <= limit,
                detail=part if gate.max_size.share is not None else "",
            )
        )
    return found


def _increase(limit: float, outcome: Outcome) -> GateReport:
    """Perplexity after over before, less one. Two-sided: a model that got better says that the measure is wrong."""

    def change(old: TextScore | None, new: TextScore) -> float | None:
        if old is None or old.perplexity is None or new.perplexity is None:
            return None
        return new.perplexity / old.perplexity - 1

    changes = _each(outcome, change)
    found = _worst("max_ppl_increase", limit, changes, outcome)
    text, gain = min(_known(changes), key=itemgetter(1), default=("", 0.0))
    if not found.passed or outcome.learned or gain >= -max(limit, GAIN):
        return found
    why = f"{text}: an implausible gain; the text may be that of the calibration, or the original is broken"
    return found.model_copy(update={"value": gain, "passed": False, "detail": why})


def _divergence(limit: float, outcome: Outcome) -> GateReport:
    divergences = _each(outcome, lambda _, new: new.kl)
    found = _worst("max_kl", limit, divergences, outcome)
    text, least = min(_known(divergences), key=itemgetter(1), default=("", 0.0))
    if not found.passed or least >= -KL_NOISE:
        return found
    return found.model_copy(update={"value": least, "passed": False, "detail": f"{text}: KL is never below 0"})


def _each(outcome: Outcome, measure: Callable[[TextScore | None, TextScore], float | None]) -> Values:
    """A measure on each text, from the score of the original (None where it has none) and of the result."""
    old, new = (outcome.measures[name].scores if name in outcome.measures else [] for name in ("before", "after"))
    before = {(score.dataset, score.fingerprint): score for score in old}
    return [(text_name(s.dataset), measure(before.get((s.dataset, s.fingerprint)), s)) for s in new]


def _known(values: Values) -> list[tuple[str, float]]:
    return [(text, value) for text, value in values if value is not None]


def _worst(name: str, limit: float, values: Values, outcome: Outcome, *, sign: int = 1) -> GateReport:
    """The verdict on the text with the largest value, with `sign` -1 the smallest; NaN and no value are the worst."""
    for text, value in values:
        if value is None or not math.isfinite(value):
            why = f"{text}: {'not measured' if value is None else 'not a finite number'}"
            return GateReport(name=name, limit=limit, value=None, passed=False, detail=why)
    text, value = max(_known(values), key=lambda item: sign * item[1], default=("", None))
    if value is None:
        return GateReport(name=name, limit=limit, value=None, passed=False, detail=outcome.why or "not measured")
    return GateReport(name=name, limit=limit, value=value, passed=sign * value <= sign * limit, detail=text)


# --- once the report is shown


def failed_gates(report: Report) -> list[str]:
    """What the result does not keep to, a line each."""
    return [gate_line(gate) for stage in report.stages for gate in stage.gates if not gate.passed]


def check_gates(report: Report) -> None:
    """Fail a run whose report is shown: by its gates, and by `run.strict`; both are told.

    Raises:
        GateError: a gate failed, or the recipe is strict and an event says that something was degraded; the result is
            kept.
    """
    failed = failed_gates(report)
    events = [event.message for event in report.events if event.kind not in NOTICES]
    degraded = events if report.recipe["run"]["strict"] else []
    if not failed and not degraded:
        return
    what = [f"{len(failed)} gate{'s' * (len(failed) > 1)} failed"] if failed else []
    what += [f"--strict: {len(degraded)} event{'s' * (len(degraded) > 1)}"] if degraded else []
    where = f"; the result is in {report.output}" if report.output else ""
    shown = "\n".join(f"  - {line}" for line in [*failed, *degraded[:10]])
    raise GateError(f"{', '.join(what)}{where}:\n{shown}")


__all__ = [
    "NOTICES",
    "Outcome",
    "check_gates",
    "check_size",
    "failed_gates",
    "judge",
    "refuse_unanswerable",
    "size_limit",
]
