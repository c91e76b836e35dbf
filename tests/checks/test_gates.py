"""Verdicts on reports: each gate passes, fails, or could not be asked; the numbers by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from llmshrink.checks.gates import Outcome, check_gates, check_size, judge
from llmshrink.errors import GateError
from llmshrink.plan.schema import Plan
from llmshrink.recipe.gate import GateSpec
from llmshrink.report.schema import EventRecord, GateReport, ModelInfo, ModelMeasure, Report, StageReport, TextScore


def score(dataset: str, **measured: Any) -> TextScore:
    fields = {"fingerprint": dataset, "rows": 1, "length": 2, "tokens": 1, "protocol": "", **measured}
    return TextScore.model_construct(dataset=dataset, **fields)  # NaN too, which a report refuses


def outcome(before: dict[str, float], after: dict[str, float], **more: Any) -> Outcome:
    """Perplexities by text; `more` holds KL and top-1 by text, of the result."""
    others = [{key: values[name] for key, values in more.items() if name in values} for name in after]
    old = [score(name, perplexity=value) for name, value in before.items()]
    new = [score(name, perplexity=v, **rest) for (name, v), rest in zip(after.items(), others, strict=True)]
    measures = {"before": ModelMeasure(label="before"), "after": ModelMeasure(label="after")}
    measures = {
        name: measure.model_copy(update={"scores": found})
        for (name, measure), found in zip(measures.items(), (old, new), strict=True)
    }
    return Outcome(measures, original_bytes=1000, bytes=300)


def verdict(found: Outcome, **gate: Any) -> GateReport:
    (only,) = judge(GateSpec.model_validate(gate), found)
    return only


TWO = ({"a.txt": 10.0, "b": 20.0}, {"a.txt": 10.1, "b": 20.6})


@pytest.mark.parametrize(("limit", "passed"), [("4%", True), ("3%", False), ("2.9%", False), (0.0301, True)])
def test_the_worst_increase_counts(limit: str | float, passed: bool) -> None:
    found = verdict(outcome(*TWO), max_ppl_increase=limit)
    assert (found.name, found.detail, found.passed) == ("max_ppl_increase", "b", passed)
    assert found.value == 20.6 / 20.0 - 1


@pytest.mark.parametrize(
    ("fall", "limit", "passed"),
    [(0.009, "0%", True), (0.011, "0%", False), (0.029, "3%", True), (0.031, "3%", False), (0.5, "60%", True)],
)
def test_a_model_that_got_better_is_not_believed(fall: float, limit: str, passed: bool) -> None:
    found = verdict(outcome({"a": 10.0, "b": 10.0}, {"a": 10.0, "b": 10 * (1 - fall)}), max_ppl_increase=limit)
    assert found.passed == passed
    if not passed:
        assert "b: an implausible gain" in found.detail and found.value == pytest.approx(-fall)


def test_an_increase_is_told_before_a_gain() -> None:
    found = verdict(outcome({"a": 10.0, "b": 10.0}, {"a": 20.0, "b": 5.0}), max_ppl_increase="3%")
    assert (found.value, found.detail) == (1.0, "a")


@pytest.mark.parametrize(
    ("kl", "passed"), [(0.0199, True), (0.02, True), (0.0201, False), (-1e-6, True), (-1e-4, False)]
)
def test_divergence_has_two_sides(kl: float, passed: bool) -> None:
    found = verdict(outcome(*TWO, kl={"a.txt": kl, "b": min(kl, 0.001)}), max_kl=0.02)
    assert (found.passed, found.value) == (passed, kl if kl > 0.001 else min(kl, 0.001))
    assert ("KL is never below 0" in found.detail) == (kl < -1e-5)


@pytest.mark.parametrize(("limit", "passed"), [("97%", True), ("98%", False)])
def test_the_smallest_agreement_counts(limit: str, passed: bool) -> None:
    found = verdict(outcome(*TWO, top1={"a.txt": 0.99, "b": 0.97}), min_top1=limit)
    assert (found.passed, found.value, found.detail) == (passed, 0.97, "b")


@pytest.mark.parametrize(("limit", "passed"), [(300, True), (299, False), ("30%", True), ("29.9%", False)])
def test_size(limit: int | str, passed: bool) -> None:
    found = verdict(outcome({}, {}), max_size=limit)
    assert (found.passed, found.value) == (passed, 300)
    assert ("30.0% of the original's" in found.detail) == isinstance(limit, str)


GATES: list[dict[str, Any]] = [{"max_ppl_increase": "90%"}, {"max_kl": 9.0}, {"min_top1": "0%"}]


@pytest.mark.parametrize("gate", GATES)
def test_what_was_not_measured_fails_with_the_reason(gate: dict[str, Any]) -> None:
    measures = {"before": ModelMeasure(label="before")}
    for found, words in (
        (Outcome(measures, 1, 1, "quality of the result: not finite"), "quality of the result: not finite"),
        (Outcome({**measures, "after": measures["before"]}, 1, 1), "not measured"),
        (outcome({}, {"a": 3.0}) if "max_ppl_increase" in gate else outcome({"a": 2.0}, {"a": 3.0}), "a: not measured"),
    ):
        told = verdict(found, **gate)
        assert (told.passed, told.value, told.detail) == (False, None, words)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_fails(gate: dict[str, Any], value: float) -> None:
    spoiled = {"good": 1.0, "bad": value}
    whole = {"good": 1.0, "bad": 1.0}
    told = verdict(outcome(whole, spoiled, kl=spoiled, top1=spoiled), **gate)
    assert (told.passed, told.value, told.detail) == (False, None, "bad: not a finite number")


def test_two_texts_of_one_name_are_two() -> None:
    found = outcome({"x/a.txt": 1.0, "y/a.txt": 1.0}, {"x/a.txt": 2.0, "y/a.txt": 1.0})
    assert verdict(found, max_ppl_increase="50%").value == 1.0


def report(gates: list[GateReport], *, strict: bool = False, events: list[str] | None = None) -> Report:
    stage = StageReport(task="quantize", format="dense", bytes_before=1, bytes_after=1, bits_per_weight=1, gates=gates)
    return Report(
        llmshrink_version="0", recipe={"run": {"strict": strict}}, recipe_hash="", device="cpu", seed=0, threads=1,
        model=ModelInfo(id="m", source="hub"), stages=[stage], output="out/m", seconds=1,
        events=[EventRecord(kind=kind, message=f"about {kind}") for kind in events or []],
    )  # fmt: skip


def gate(passed: bool, name: str = "max_kl") -> GateReport:
    return GateReport(name=name, limit=0.02, value=0.05, passed=passed, detail="stories")


def test_gates_and_strictness_are_told_together() -> None:
    check_gates(report([gate(True)], events=["fallback"]))
    check_gates(report([], strict=True, events=["left_dense"]))
    with pytest.raises(GateError) as caught:
        check_gates(report([gate(False), gate(True), gate(False, "min_top1")], strict=True, events=["fallback"]))
    assert caught.value.message.splitlines() == [
        "2 gates failed, --strict: 1 event; the result is in out/m:",
        "  - max_kl: 0.05000, asked at most 0.02000 (stories)",
        "  - min_top1: 5.00 %, asked at least 2.00 % (stories)",
        "  - about fallback",
    ]
    with pytest.raises(GateError, match="^1 gate failed; the result"):
        check_gates(report([gate(False)], events=["fallback"]))


def test_a_plan_that_is_too_large_is_refused() -> None:
    files = {"a": 10, "b": 20}
    for limit in (None, 30):
        check_size(Plan.model_construct(file_bytes=files, max_bytes=limit))
    with pytest.raises(GateError, match="planned with 30 bytes, and 29 are allowed"):
        check_size(Plan.model_construct(file_bytes=files, max_bytes=29, bytes_are_bound=False))
