"""The words and lines that the terminal and the model card share: sizes, changes, before and after, and safe text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from llmshrink.progress import seconds
from llmshrink.report.schema import (
    AdapterReport,
    AllocationReport,
    BlockReport,
    CacheReport,
    CutReport,
    EventRecord,
    GateReport,
    ModelInfo,
    ModelMeasure,
    PackReport,
    RatiosReport,
    Report,
    StageReport,
    TextScore,
    TrainReport,
    TransformReport,
    TuneReport,
)

NOT_MEASURED = "not measured"
TARGETS = 8  # names of linears in one line
NOTHING = "-"  # where a number makes no sense, such as the original's divergence from itself


@dataclass(frozen=True)
class Row:
    """One line of the comparison."""

    label: str
    before: str
    after: str
    change: str = ""


def clean(text: str) -> str:
    """Untrusted text on one line, without control characters, terminal escapes or marks that reorder text."""
    return " ".join("".join(c if c.isprintable() else " " if c.isspace() else "" for c in text).split())


def source_name(model: ModelInfo) -> str:
    """The model's id; of a folder only its last part, because paths of a machine are nobody's business."""
    return clean(Path(model.id).name if model.source == "folder" else model.id)


def text_name(dataset: str) -> str:
    """A text as readers should see it: the name of a file without its folders."""
    return clean(Path(dataset).name if Path(dataset).suffix in (".txt", ".json", ".jsonl", ".parquet") else dataset)


def comparison(report: Report) -> list[Row]:
    """Every measure before and after; what was not measured is said so."""
    before, after = report.before, report.after
    rows = _sizes(report)
    task = report.model.task
    for old, new in _texts(before, after):
        rows += _quality(old, new, "row" if task == "text-classification" else "token")
    causal = task == "text-generation"
    if not any(measure and measure.scores for measure in (before, after)):
        alone = not causal and after is None and not any(stage.layers for stage in report.stages)
        missing = "only beside another model: --baseline" if alone else NOT_MEASURED
        rows.append(Row("perplexity" if causal else "likeness to the original", missing, NOT_MEASURED))
    speeds = [
        _row("prefill" if causal else "forward pass", before, after, lambda m: m.prefill_tokens_per_second, _speed)
    ]
    if causal:
        speeds.append(_row("decode", before, after, lambda m: m.decode_tokens_per_second, _speed))
    return [
        *rows,
        _row("load", before, after, lambda m: m.load_seconds, seconds),
        *speeds,
        _row("peak memory, load and run", before, after, lambda m: m.peak_memory_bytes, decimal),
    ]


def _sizes(report: Report) -> list[Row]:
    before, after = report.before, report.after
    stages = [stage for stage in report.stages if stage.layers]  # an eval stage changes nothing
    old = before.tensor_bytes if before and before.tensor_bytes is not None else None
    new = after.tensor_bytes if after and after.tensor_bytes is not None else None
    if stages:  # what was written is known, evaluated or not
        old = stages[0].bytes_before if old is None else old
        new = stages[-1].bytes_after if new is None else new
    bits = after.bits_per_weight if after and after.bits_per_weight is not None else None
    if bits is None and stages:
        bits = stages[-1].bits_per_weight
    old_bits = before.bits_per_weight if before else None
    return [
        Row("tensors on disk", _or(old, decimal), _or(new, decimal), _change(old, new)),
        Row("bits per weight, all tensors", _or(old_bits, _bits), _or(bits, _bits), _change(old_bits, bits)),
        _row("loaded, after a forward pass", before, after, lambda m: m.loaded_bytes, decimal),
    ]


def _texts(before: ModelMeasure | None, after: ModelMeasure | None) -> list[tuple[TextScore | None, TextScore | None]]:
    """Scores on the same tokens side by side, in the order they were measured."""
    old = {(s.dataset, s.fingerprint): s for s in (before.scores if before else [])}
    new = {(s.dataset, s.fingerprint): s for s in (after.scores if after else [])}
    return [(old.get(key), new.get(key)) for key in {**new, **old}]


def _quality(old: TextScore | None, new: TextScore | None, unit: str) -> list[Row]:
    name = text_name((new or old).dataset)  # type: ignore[union-attr]  # one of them is given
    if new is not None and new.perplexity is None:
        return _likeness(new, name, unit)
    before, after = (score.perplexity if score else None for score in (old, new))
    rows = [Row(f"perplexity, {name}", _or(before, _perplexity), _or(after, _perplexity), _change(before, after))]
    if new is not None:
        rows.append(Row("  KL to the original, nats/token", NOTHING, _or(new.kl, _divergence)))
        rows.append(Row("  same first choice", NOTHING, _or(new.top1, share)))
    return rows


def _likeness(score: TextScore, name: str, unit: str) -> list[Row]:
    """What is measured of a model that predicts no next token; the first line names the text."""
    values: list[tuple[str, float | None, Callable[[float], str]]] = [
        ("same first choice", score.top1, share),
        (f"KL to the original, nats/{unit}", score.kl, _divergence),
        ("cosine to the original's output", score.cosine, _divergence),
        ("relative error of the output", score.relative_error, share),
    ]
    known = [(label, form(value)) for label, value, form in values if value is not None]
    return [Row(f"  {label}" if i else f"{label}, {name}", NOTHING, value) for i, (label, value) in enumerate(known)]


def _row(
    label: str,
    before: ModelMeasure | None,
    after: ModelMeasure | None,
    get: Callable[[ModelMeasure], float | None],
    form: Callable[..., str],
) -> Row:
    old, new = (None if measure is None else get(measure) for measure in (before, after))
    return Row(label, _or(old, form), _or(new, form), _change(old, new))


def _or(value: float | None, form: Callable[..., str]) -> str:
    return NOT_MEASURED if value is None else form(value)


def _change(old: float | None, new: float | None) -> str:
    return f"{100 * (new - old) / old:+.1f} %" if old and new is not None else ""


def _bits(value: float) -> str:
    return f"{value:.2f}"


def _perplexity(value: float) -> str:
    return f"{value:.3f}" if value < 1e6 else f"{value:.2e}"


def _divergence(value: float) -> str:
    return f"{value:.5f}"


def _speed(value: float) -> str:
    return f"{value:,.0f} tok/s" if value >= 100 else f"{value:.1f} tok/s"


def share(value: float) -> str:
    """A share of one as a percentage."""
    return f"{100 * value:.1f} %"


def gate_cells(gate: GateReport) -> tuple[str, str, str]:
    """A gate's name, limit and value in words."""
    forms: dict[str, Callable[..., str]] = {
        "max_kl": _divergence,
        "max_size": lambda size: decimal(int(size), precision=3),
    }
    form = forms.get(gate.name, _percent)
    limit = f"at {'least' if gate.name.startswith('min') else 'most'} {form(gate.limit)}"
    return clean(gate.name), limit, _or(gate.value, form)


def gate_line(gate: GateReport) -> str:
    """A gate in one line."""
    name, limit, value = gate_cells(gate)
    return f"{name}: {value}, asked {limit}" + (f" ({clean(gate.detail)})" if gate.detail else "")


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def count(number: int, thing: str) -> str:
    """A number of things: 1 layer, 2 layers."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def protocols(report: Report) -> list[str]:
    """How each text was scored, one line for texts that share a protocol."""
    texts: dict[str, list[str]] = {}
    for old, new in _texts(report.before, report.after):
        score = new or old
        if score is not None:
            where = f"{text_name(score.dataset)} ({score.rows} rows, {score.tokens:,} tokens)"
            texts.setdefault(clean(score.protocol), []).append(where)
    return [f"{', '.join(names)}: {protocol}" for protocol, names in texts.items()]


SHOWN = ("sparsity", "pattern", "keep", "rank", "bits", "group_size")  # settings of a method in the line that names it


def stage_methods(report: Report) -> list[str]:
    """Each stage in a few words: its task, its method, and the settings that matter most."""
    found = []
    for stage in report.stages:
        settings = [f"{key} {value}" for key, value in stage.method.items() if key in SHOWN and value is not None]
        name = str(stage.method.get("name", ""))
        words = [stage.task, *([name] if name and name != stage.task else []), *settings]
        found.append(clean(" ".join(words)))
    return found


def stage_titles(report: Report) -> list[str]:
    """What stands above each stage."""
    if sum(stage.task != "eval" for stage in report.stages) <= 1:
        return ["What was done" for _ in report.stages]
    return [f"Stage {number}: {clean(stage.task)}" for number, stage in enumerate(report.stages, 1)]


def course_names(report: Report) -> dict[int, str]:
    """Names of the files that show the course of each training, without their ends, by the number of its stage."""
    trained = [number for number, stage in enumerate(report.stages, 1) if stage.trained is not None]
    return {number: "loss" if len(trained) == 1 else f"loss-{number}" for number in trained}


def _behind(found: ModelMeasure) -> str:
    """What was measured of the model behind one of several stages."""
    parts = [] if found.parameters is None else [f"{found.parameters:,} parameters"]
    parts += [] if found.bits_per_weight is None else [f"{_bits(found.bits_per_weight)} bits each"]
    for score in found.scores:
        values = [] if score.perplexity is None else [f"perplexity {_perplexity(score.perplexity)}"]
        values += [] if score.kl is None else [f"KL {_divergence(score.kl)}"]
        parts.append(f"{text_name(score.dataset)} {', '.join(values)}")
    return f"behind it: {'; '.join(parts)}"


def stage_lines(stage: StageReport) -> list[str]:
    """What a stage did, what it took, and what it had planned."""
    done = [layer for layer in stage.layers if layer.method is not None]
    weights = sum(layer.parameters for layer in done)
    settings = ", ".join(f"{k} {v}" for k, v in stage.method.items() if k in SHOWN and v is not None)
    what = f" with {stage.method['name']} ({settings or 'default settings'})" if stage.method else ""
    if stage.task == "export":
        what = f" of what was stored ({settings or 'of several kinds'})"
    if stage.type is not None:
        what = f" with {stage.method['name']}"
    lines = [f"{stage.task}{what}, {stage.format}" + (f" {stage.type}" if stage.type else "")]
    if stage.trained is not None:
        lines = [stage.task if stage.adapter is None else f"{stage.task} with {stage.adapter.name}"]
    if stage.cut is not None:
        lines = _cut(stage.cut)
    start = stage.method.get("start")
    if start is not None:
        lines.append(
            f"trained through the rounding that {start} began ({settings or 'default settings'}), {stage.format}"
        )
    if weights and (start is not None or (stage.cut is None and stage.trained is None)):
        bits = 8 * sum(layer.bytes_after for layer in done) / weights
        lines.append(f"{count(len(done), 'layer')} at {bits:.2f} bits per weight, scales counted")
        if zeros := sum(layer.zeros or 0 for layer in done if stage.task == "prune"):
            lines.append(f"{zeros / weights:.2%} of their weights are zero")
    for how in dict.fromkeys(layer.inputs for layer in done if layer.inputs):
        lines.append(f"their inputs are rounded: {how}")
    if stage.transforms:
        lines.append(_transformed(stage.transforms))
    if stage.allocation is not None:
        lines += _allocated(stage.allocation)
    if stage.ratios is not None and stage.ratios.units:
        lines.append(_shares(stage.ratios))
    if stage.blocks:
        lines.append(_learned(stage.blocks, fitted=stage.cut is not None))
    if stage.tuned is not None:
        lines.append(_tuned(stage.tuned))
    if stage.adapter is not None:
        lines.append(_adapter(stage.adapter))
    if stage.trained is not None:
        lines.append(_trained(stage.trained))
        lines += [cached(stage.trained.cache)] if stage.trained.cache is not None else []
        lines += [*_stayed(stage.trained), *_drawn(stage.trained)]
    if stage.after is not None:
        lines.append(_behind(stage.after))
    fallbacks = sum(layer.fallback for layer in stage.layers)
    if fallbacks:
        lines.append(f"{count(fallbacks, 'layer')} by the method's fallback")
    if stage.packed is not None:
        lines.append(_packed(stage.packed))
    if (limit := stage.planned_bytes_after) is not None:
        bound = stage.packed is not None or (stage.adapter is not None and stage.adapter.at_most)
        kept = stage.bytes_after <= limit if bound else stage.bytes_after == limit
        most = f" (at most {decimal(limit)})" if bound else ""
        lines.append(f"{decimal(stage.bytes_after)} of tensors, {'' if kept else 'NOT '}as planned{most}")
    planned, measured = stage.memory.planned_bytes, stage.memory.measured_bytes
    if measured is not None:
        lines.append(f"peak memory {decimal(measured)}" + (f", planned {decimal(planned)}" if planned else ""))
    if stage.seconds:
        lines.append(", ".join(f"{step} {seconds(taken)}" for step, taken in stage.seconds.items()))
    return [clean(line) for line in lines]


def _packed(found: PackReport) -> str:
    """What entropy coding gained."""
    gain = 1 - found.bytes_after / found.bytes_before
    stayed = f" ({found.plain} of {found.plain + found.tensors} tensors would not gain)" if found.plain else ""
    sizes = f"{decimal(found.bytes_before)} -> {decimal(found.bytes_after)}"
    return f"codes packed ({found.codec}): {sizes}, {gain:.1%} fewer bytes{stayed}"


def _transformed(found: list[TransformReport]) -> str:
    """Which transforms rewrote the weights, and what is left of the error that they were to lessen."""
    told = []
    for name in dict.fromkeys(each.name for each in found):
        shares = [each.error_left for each in found if each.name == name and each.error_left is not None]
        mean = sum(shares) / len(shares) if shares else None
        told.append(name if mean is None else f"{name} (leaves {mean:.2f} of the error of rounding)")
    worst = max(each.difference for each in found)
    return f"weights rewritten first: {', '.join(told)}; the blocks did the same to {worst:.0e}"


def candidate_words(keys: Mapping[str, Any]) -> str:
    """A candidate in short: `W2 g64`, `Q4_K`."""
    forms: dict[str, Callable[[Any], str]] = {"bits": lambda n: f"W{n}", "group_size": lambda n: f"g{n}", "type": str}
    return clean(" ".join(forms[k](v) if k in forms else f"{k} {v}" for k, v in keys.items()))


def _allocated(found: AllocationReport) -> list[str]:
    """How near the size came, and how often each candidate was chosen."""
    asked = decimal(found.asked_bytes, precision=3)
    if found.asked_bits_per_weight is not None:
        asked = f"{found.asked_bits_per_weight:g} bits per weight"
    below = 1 - found.bytes / found.asked_bytes
    lines = [f"asked for {asked}, met with {decimal(found.bytes, precision=3)}, {below:.2%} below"]
    chosen = Counter(unit.chosen for unit in found.units)
    counts = [f"{candidate_words(keys)} x {chosen[i]}" for i, keys in enumerate(found.candidates) if chosen[i]]
    how = "" if found.predicted is None else f"; the costs measured add up to {found.predicted:.5f} ({found.score})"
    return [*lines, f"chosen for {count(len(found.units), 'unit')} of layers: {', '.join(counts)}{how}"]


def _shares(found: RatiosReport) -> str:
    """Between which shares the layers lie that got their own, and of what the extremes are."""
    order = sorted(found.units, key=lambda unit: unit.sparsity)
    ends = (f"{unit.sparsity:.1%} ({unit.layers.partition(', ')[0]})" for unit in (order[0], order[-1]))
    edge = "" if found.threshold is None else f", all weights below {found.threshold:.3g}"
    return f"{found.name}: {count(len(order), 'share')} from {' to '.join(ends)}{edge}"


def sizes(before: Mapping[str, int], kept: Mapping[str, int]) -> list[str]:
    """What is kept of everything: `6 of 8 layers`."""
    return [f"{kept[name]:,} of {number:,} {name}" for name, number in before.items() if kept[name] != number]


def _cut(cut: CutReport) -> list[str]:
    """What was cut out, by what, and against what else it was measured."""
    first, *others = cut.candidates
    kept = sizes(cut.before, first.kept)
    lines = [f"kept {', '.join(kept)}: {first.parameters:,} parameters"]
    if ranked := [f"{name} by {how}" for name, how in cut.criteria.items() if first.kept[name] != cut.before[name]]:
        lines.append(f"chosen: {', '.join(ranked)}")
    if gone := [i for i in range(cut.before["layers"]) if i not in first.layers]:
        lines.append(f"layers that are gone: {', '.join(map(str, gone))}")
    if others and first.cost is not None:
        costs = ", ".join(f"{one.cost:.4f} ({one.found_by})" for one in others if one.cost is not None)
        lines.append(f"it costs {first.cost:.4f} on a few calibration rows ({first.found_by}); others {costs}")
    return lines


def _learned(blocks: list[BlockReport], *, fitted: bool) -> str:
    """What learning blocks together gained, in all."""
    before, after = (sum(getattr(block, name) for block in blocks) for name in ("error_before", "error_after"))
    left = sum(block.error_after >= block.error_before for block in blocks)
    what, of = ("fitted", "what it was without") if fitted else ("learned", "the method's")
    gained = f"{count(len(blocks), 'block')} {what}: their error is {after / before if before else 1:.2f} of {of}"
    return gained + (f"; {left} got no better and stayed as they were" if left else "")


def _trained(found: TrainReport) -> str:
    """What a training gained."""
    held, classes = "no rows were held back", found.text is not None and found.text.kind == "classes"
    if found.held_before is not None and found.held_after is not None:
        measure = "KL to it" if found.measure == "kl" else "loss"
        if found.cache is not None:
            measure += ", estimated," if found.cache.method == "sampled" else ", at least,"
        what = count(found.tokens_held, "row") if classes else f"{found.tokens_held:,} tokens"
        held = f"{measure} on {what} held back {found.held_before:.4f} -> {found.held_after:.4f}"
    of = "" if found.text is None else f" of {found.text.origin}"
    if found.text is not None and found.text.kind not in ("text", "classes"):
        of += f" ({found.text.counted / found.text.tokens:.0%} of it learned)"
    text = f"{found.tokens:,} tokens of {count(found.rows, 'row')}{of} in {count(found.steps, 'step')} of gradient"
    text += f" by {found.processes} processes" if found.processes > 1 else ""
    name = found.teacher or "text"
    teacher = Path(name).name if Path(name).is_dir() else name
    if found.aligned is not None:
        teacher += f" where both end a token ({found.aligned:.0%} of the positions)"
    return f"learned from {teacher}, {text}, {seconds(found.seconds)}: {held}"


def _stayed(found: TrainReport) -> list[str]:
    """The zeros of a pruned model."""
    if not found.zeros:
        return []
    part = sum(one.after for one in found.zeros) / sum(one.weights for one in found.zeros)
    return [f"the zeros of {len(found.zeros)} pruned matrices stayed: {share(part)} of their weights"]


def _drawn(found: TrainReport) -> list[str]:
    """The rounds of a lottery."""
    if not found.rounds:
        return []
    held = [f"{one.held_after:.4f} at {share(one.sparsity)}" for one in found.rounds if one.held_after is not None]
    after = f"; held back after each: {', '.join(held)}" if held else ""
    return [f"drawn in {count(len(found.rounds), 'training')}, whose steps and tokens are counted together{after}"]


def cached(found: CacheReport) -> str:
    """What was kept of a teacher's words."""
    kept = f"{found.tokens:,} of {found.vocabulary:,} tokens of each position, {share(found.covered)} of its chances"
    size = f"{decimal(found.bytes)}, {found.bytes_per_token:.1f} bytes a token"
    return f"its words were written down once ({found.method}): {kept}, {size}, made in {seconds(found.seconds)}"


def _adapter(found: AdapterReport) -> str:
    """How little learned."""
    size = f", {decimal(found.bytes)}" if found.bytes else ""
    beside = f" beside {', '.join(found.targets[:TARGETS])}" if found.targets else ""
    more = ", ..." if len(found.targets) > TARGETS else ""
    base = "; the model is held in 4 bits" if found.four_bits else ""
    if found.accuracy is not None and found.most is not None:
        base += f"; {len(found.classes)} classes, {share(found.accuracy)} of rows held back right"
        base += f" (always the same one: {share(found.most)})"
    return f"{found.learns:,} numbers learn, {share(found.share)} of the model{size}{beside}{more}{base}"


def _tuned(tuned: TuneReport) -> str:
    """What tuning from end to end gained."""
    what = "scales and norms"
    if not tuned.steps:
        return f"{what} stayed as they were: tuning made nothing better"
    kl = f"{_divergence(tuned.kl_before)} -> {_divergence(tuned.kl_after)}"
    return f"{what} tuned in {count(tuned.steps, 'step')}: KL {kl} on {tuned.tokens_held:,} tokens held back"


def grouped_events(events: Iterable[EventRecord]) -> list[str]:
    """One line per kind and message; the layers counted, the first of them named."""
    groups: dict[tuple[str, str], list[str]] = {}
    for event in events:
        groups.setdefault((event.kind, event.message), []).append(event.layer or "")
    lines = []
    for (kind, message), layers in groups.items():
        named = [layer for layer in layers if layer]
        more = f" and {len(named) - 1} more" if len(named) > 1 else ""
        times = f" ({len(layers)} times)" if len(layers) > 1 and not named else ""
        lines.append(clean(f"{kind}: {message}" + (f" [{named[0]}{more}]" if named else times)))
    return lines


__all__ = [
    "NOTHING",
    "NOT_MEASURED",
    "Row",
    "cached",
    "candidate_words",
    "clean",
    "comparison",
    "count",
    "gate_cells",
    "gate_line",
    "grouped_events",
    "protocols",
    "share",
    "sizes",
    "source_name",
    "text_name",
    "stage_lines",
]
