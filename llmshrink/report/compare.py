"""Several results of one model side by side: what each takes and keeps, and which of them no other beats."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, ValidationError
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from llmshrink.errors import InputError
from llmshrink.report.card import escape
from llmshrink.report.rows import NOT_MEASURED, clean, source_name, stage_methods, text_name
from llmshrink.report.schema import ModelMeasure, Record, Report, TextScore

FILE = "report.json"
FRONT = "*"  # marks what no other result beats


class TextCompared(Record):
    """One result on one text that all were measured on."""

    text: str
    perplexity: float | None
    kl: float | None = Field(description="KL(original || it), nats per token")
    top1: float | None
    more: float | None = Field(default=None, description="KL above that of the first result; None: it is the first")
    error: float | None = Field(default=None, description="standard error of that, from the differences of rows")


class Entry(Record):
    """One result."""

    name: str
    how: str = Field(description="tasks and methods; of the original: nothing")
    tensor_bytes: int | None
    parameters: int | None
    bits_per_weight: float | None
    texts: list[TextCompared]
    decode_tokens_per_second: float | None
    peak_memory_bytes: int | None
    gates_failed: int
    events: int
    front: bool = Field(description="no other is as small with less KL, or smaller with as little (mean of texts)")


class Comparison(Record):
    """Results of one model."""

    model: str
    original: Entry | None = Field(description="None: nothing was measured of it")
    entries: list[Entry]
    left_out: list[str] = Field(description="texts that not all were measured on")


def read_report(path: Path) -> Report:
    """The report in a result's folder, or in a file.

    Raises:
        InputError: there is none.
    """
    file = path / FILE if path.is_dir() else path
    try:
        return Report.model_validate_json(file.read_bytes())
    except OSError as error:
        raise InputError(
            f"{path}: no {FILE} can be read ({error.strerror}).", hint="Name folders that llmshrink wrote."
        ) from error
    except ValidationError as error:
        raise InputError(f"{file} is no report of this version: {error.errors()[0]['msg']}.") from error


def compare(reports: Mapping[str, Report]) -> Comparison:
    """Put reports side by side, in their order.

    Args:
        reports: by the names that they shall have.

    Raises:
        InputError: they are of several models, or one of them measured nothing.
    """
    (first_name, first), *others = reports.items()
    for name, report in others:
        if report.model.files != first.model.files:
            raise InputError(
                f"{name} was made from {report.model.id}, and {first_name} from {first.model.id}, or from other files "
                "of it: KL to one model and KL to another say nothing of each other.",
                hint="Compare results of one model, unchanged since.",
            )
    found = {name: _measure(name, report) for name, report in reports.items()}
    tables = {name: {s.fingerprint: s for s in measure.scores} for name, measure in found.items()}
    common = [key for key in tables[first_name] if all(key in table for table in tables.values())]
    left = {
        s.fingerprint: text_name(s.dataset) for m in found.values() for s in m.scores if s.fingerprint not in common
    }
    base = [tables[first_name][key] for key in common]
    entries = [_entry(name, reports[name], found[name], [tables[name][key] for key in common], base) for name in found]
    best = front([(entry.tensor_bytes, _mean(entry)) for entry in entries])
    entries = [entry.model_copy(update={"front": on}) for entry, on in zip(entries, best, strict=True)]
    before = {s.fingerprint: s for s in first.before.scores} if first.before else {}
    scores = [before[key] for key in common if key in before]
    original = None if first.before is None else _entry("original", None, first.before, scores, [])
    return Comparison(
        model=source_name(first.model), original=original, entries=entries, left_out=sorted(set(left.values()))
    )


def _measure(name: str, report: Report) -> ModelMeasure:
    if report.after is None:
        raise InputError(f"{name}: nothing was measured of what was written.", hint="Run it with evaluation.data.")
    return report.after


def _entry(
    name: str, report: Report | None, measure: ModelMeasure, scores: list[TextScore], first: list[TextScore]
) -> Entry:
    return Entry(
        name=name,
        how="" if report is None else " -> ".join(stage_methods(report)),
        tensor_bytes=measure.tensor_bytes,
        parameters=measure.parameters,
        bits_per_weight=measure.bits_per_weight,
        texts=[_compared(score, base) for score, base in zip(scores, first or scores, strict=True)],
        decode_tokens_per_second=measure.decode_tokens_per_second,
        peak_memory_bytes=measure.peak_memory_bytes,
        gates_failed=0 if report is None else sum(not g.passed for stage in report.stages for g in stage.gates),
        events=0 if report is None else len(report.events),
        front=False,
    )


def _compared(score: TextScore, first: TextScore) -> TextCompared:
    found = TextCompared(text=text_name(score.dataset), perplexity=score.perplexity, kl=score.kl, top1=score.top1)
    if score is first or len(score.kl_rows) != len(first.kl_rows) or not score.kl_rows:
        return found
    more, error = paired(score.kl_rows, first.kl_rows, score.tokens_rows)
    return found.model_copy(update={"more": more, "error": error})


def paired(ones: list[float], others: list[float], tokens: list[int]) -> tuple[float, float | None]:
    """The mean difference per token of sums over rows, and its standard error; None: of one row.

    Rows are drawn, tokens are not: the error is that of a ratio of sums over rows (Cochran 1977, eq. 6.13).
    """
    differences = [a - b for a, b in zip(ones, others, strict=True)]
    count, total = len(differences), sum(tokens)
    mean = sum(differences) / total
    if count == 1:
        return mean, None
    squares = sum((d - mean * n) ** 2 for d, n in zip(differences, tokens, strict=True))
    return mean, math.sqrt(count / (count - 1) * squares) / total


def front(points: list[tuple[int | None, float | None]]) -> list[bool]:
    """Of (bytes, KL), which no other point beats in one and equals or beats in the other; never one that lacks one."""

    def beaten(one: tuple[int, float], other: tuple[int, float]) -> bool:
        return other != one and other[0] <= one[0] and other[1] <= one[1]

    known = [(size, kl) for size, kl in points if size is not None and kl is not None]
    return [
        size is not None and kl is not None and not any(beaten((size, kl), other) for other in known)
        for size, kl in points
    ]


def _mean(entry: Entry) -> float | None:
    values = [text.kl for text in entry.texts]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


# --- as people see it


def _cells(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headings and lines; the same in a terminal and in Markdown, but for what each must escape."""
    texts = [text.text for text in found.entries[0].texts]
    heads = ["", "how", "size", "bits/weight", *(f"KL, {text}" for text in texts), *(f"ppl, {text}" for text in texts)]
    heads += ["decode", "gates"]
    lines = []
    for entry in [*([found.original] if found.original else []), *found.entries]:
        by_text = {text.text: text for text in entry.texts}
        line = [f"{FRONT} {entry.name}" if entry.front else entry.name, entry.how]
        line.append(NOT_MEASURED if entry.tensor_bytes is None else decimal(entry.tensor_bytes))
        line.append("" if entry.bits_per_weight is None else f"{entry.bits_per_weight:.2f}")
        line += [_kl(by_text.get(text)) for text in texts]
        line += [_perplexity(by_text.get(text)) for text in texts]
        speed = entry.decode_tokens_per_second
        line.append("" if speed is None else f"{speed:,.1f} tokens/s")
        line.append("" if not entry.how else f"{entry.gates_failed} FAILED" if entry.gates_failed else "kept")
        lines.append(line)
    return heads, lines


def _kl(text: TextCompared | None) -> str:
    if text is None or text.kl is None:
        return ""
    if text.more is None:
        return f"{text.kl:.5f}"
    return f"{text.kl:.5f} ({text.more:+.5f}{'' if text.error is None else f' ± {text.error:.5f}'})"


def _perplexity(text: TextCompared | None) -> str:
    return "" if text is None or text.perplexity is None else f"{text.perplexity:.3f}"


def notes(found: Comparison) -> list[str]:
    """What stands below the table."""
    lines = [f"{FRONT} no other is as small with less KL; in brackets KL above the first's, and its standard error"]
    if found.left_out:
        lines.append(f"not measured on the same text by all, so left out: {', '.join(found.left_out)}")
    return lines


def table(found: Comparison) -> Table:
    """For a terminal."""
    heads, lines = _cells(found)
    made = Table(box=None, pad_edge=False, title=clean(found.model), title_justify="left")
    for number, head in enumerate(heads):
        made.add_column(clean(head), justify="left" if number < 2 else "right")
    for line in lines:
        made.add_row(*(Text(clean(cell)) for cell in line))
    return made


def markdown(found: Comparison) -> str:
    """For a comment in CI: names are untrusted, and shown as they are."""
    heads, lines = _cells(found)
    rows = [[escape(cell) for cell in line] for line in (heads, *lines)]
    ruler = ["---", "---", *("--:" for _ in heads[2:])]
    shown = "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ruler, *rows[1:]])
    return "\n".join([f"### {escape(found.model)}", "", shown, "", *(f"- {escape(line)}" for line in notes(found)), ""])
