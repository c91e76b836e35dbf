"""Plans, reports and checks on the terminal. Names come from untrusted files: they are cleaned and never markup."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llmshrink.progress import seconds
from llmshrink.report.rows import (
    NOT_MEASURED,
    candidate_words,
    clean,
    comparison,
    count,
    gate_cells,
    grouped_events,
    protocols,
    share,
    sizes,
    source_name,
    stage_lines,
    stage_titles,
)
from llmshrink.report.schema import Check, EventRecord, GateReport, Report, Support

if TYPE_CHECKING:
    from llmshrink.plan.schema import AllocationPlan, CachePlan, CutPlan, LayerPlan, Plan, RatiosPlan, TensorPlan

OTHERS_SHOWN = 3  # kinds of other tensors with a line of their own
COLOURS = {"native": "green", "plugin": "yellow", "dense-only": "yellow", "no": "dim"}


def render(report: Report) -> Group:
    """The report in one screen: before and after, what was done, checks, events, where the result loads."""
    parts: list[RenderableType] = [Text(source_name(report.model), style="bold"), _comparison(report)]
    parts += [_line(text, "dim") for text in protocols(report)]
    for title, stage in zip(stage_titles(report), report.stages, strict=True):
        parts += [_heading(title), *(_line(text) for text in stage_lines(stage))]
        if stage.checks:
            parts += [_heading("Verified"), _checks_in_short(stage.checks)]
        if stage.gates:
            parts += [_heading("Gates"), _gates(stage.gates)]
    parts += _samples(report)
    parts += _events(report.events)
    runtimes = next((stage.loads_in for stage in reversed(report.stages) if stage.loads_in), [])
    if runtimes:
        rows = [(line.runtime, line.support, line.reason, line.proof) for line in runtimes]
        parts += [_heading("Loads in"), _runtimes(rows)]
    if report.output is not None:
        parts += [_heading("Result"), _line(clean(report.output), "bold")]
    return Group(*parts, _line(f"{seconds(report.seconds)} in all", "dim"))


def render_checks(checks: Sequence[Check]) -> Table:
    """Every check on a line of its own."""
    table = _table("", "check", "value", "detail", right=("value",))
    for check in checks:
        value = "" if check.value is None else f"{check.value:.3g}"
        table.add_row(_verdict(check.passed), Text(clean(check.name)), value, Text(clean(check.detail)))
    return table


def render_plan(plan: Plan) -> Group:
    """The plan in one screen: one line for each kind of layer, then sizes, memory, disk and events."""
    covered = plan.parameters_compressed / plan.parameters if plan.parameters else 0.0
    bound = "at most " if plan.bytes_are_bound else ""
    lines = [
        _cut(plan.cut, plan.parameters)
        if plan.cut is not None
        else f"{plan.parameters_compressed:,} of {plan.parameters:,} parameters ({share(covered)}) are compressed",
        f"tensors {decimal(plan.bytes_before)} -> {bound}{decimal(plan.bytes_after)}, "
        f"{bound}{plan.bits_per_weight:.2f} bits per weight, all tensors counted",
        f"peak memory about {decimal(max(plan.memory_bytes, plan.evaluation_bytes))}",
        f"disk {decimal(plan.disk_bytes)} needed, {decimal(plan.disk_free)} free",
    ]
    if plan.adapter is not None:
        adapter, most = plan.adapter, "at most " if plan.adapter.at_most else ""
        steps = "as many steps as the text gives" if adapter.steps is None else count(adapter.steps, "step")
        part = f"{adapter.learns:,} numbers learn, {share(adapter.learns / plan.parameters)} of the model's"
        beside = f" beside {', '.join(adapter.targets)}" if adapter.targets else ""
        lines[0] = f"{part}{beside}: {steps} of {adapter.tokens:,} tokens"
        if adapter.bytes:
            lines[1] = f"an adapter of {most}{decimal(adapter.bytes)} beside tensors of {decimal(plan.bytes_before)}"
    if plan.training is not None:
        found = plan.training
        rounded = plan.format != "dense"
        lines[0] = lines[0] if plan.cut is not None or rounded else f"{plan.parameters:,} parameters"
        steps = "as many steps as the text gives" if found.steps is None else count(found.steps, "step")
        through = " through this rounding" if rounded else ""
        shared = f", shared by {found.processes} processes" if found.processes > 1 else ""
        shared += f", {found.trainings} times, less and less of it" if found.trainings > 1 else ""
        lines.insert(1, f"then it learns{through} from {found.teacher}: {steps} of {found.tokens:,} tokens{shared}")
        lines[2:2] = [] if found.cache is None else [_caching(found.cache)]
    if plan.tuning_steps:
        lines.insert(1, f"then scales and norms are tuned through all blocks: {plan.tuning_steps} steps of gradient")
    if plan.learning_steps:
        lines.insert(1, f"then the codes of each block are learned: {plan.learning_steps} steps of gradient")
    if plan.transforms:
        lines.insert(1, f"before that their weights are rewritten: {plan.transforms}")
    if plan.allocation is not None:
        lines[:0] = _allocation(plan.allocation, plan.parameters)
    if plan.ratios is not None:
        lines.insert(0, _ratios(plan.ratios))
    if plan.max_bytes is not None:
        size = sum(plan.file_bytes.values())
        verdict = "it fits" if size <= plan.max_bytes else "told when written" if bound else "TOO LARGE"
        lines.append(f"files {bound}{size:,} bytes, max_size allows {plan.max_bytes:,}: {verdict}")
    reasons = sorted({layer.reason for layer in plan.layers if layer.reason})
    name = f"{plan.format} {plan.type}" if plan.type else plan.format
    title = f"{plan.model}: {_method(plan.method)} -> {name}, {count(len(plan.blocks), 'block')}"
    return Group(
        Text(clean(title), style="bold"),
        _plan_table(plan),
        *(_line(text) for text in lines),
        *([_heading("Left as they are"), *(_line(clean(reason)) for reason in reasons)] if reasons else []),
        _heading("Will load in"),
        _runtimes([(line.runtime, line.support, line.reason, line.source) for line in plan.loads_in]),
        *_events([EventRecord.model_validate(event) for event in plan.events]),
    )


def _cut(cut: CutPlan, parameters: int) -> str:
    """What is kept, and what is still to be found out."""
    kept = ", ".join(sizes(cut.before, cut.kept))
    words = (
        f"{cut.parameters_before:,} -> {parameters:,} parameters ({share(parameters / cut.parameters_before)}): {kept}"
    )
    if cut.candidates > 1:
        words += f"; the best of {cut.candidates} shapes is taken, of which this is one"
    elif cut.layers is None:
        words += "; which layers go is measured"
    return words + (f"; {count(cut.repaired, 'linear')} fitted to make up for it" if cut.repaired else "")


def _caching(found: CachePlan) -> str:
    at = "" if found.temperature == 1 else f", softened by {found.temperature:g}"
    kept = f"{found.tokens:,} tokens of each position, {found.method}{at}, {found.bytes_per_token} bytes"
    if found.found:
        return f"what it says was written down before: {kept}"
    return f"what it says is written down first: {kept}" + (f", at most {decimal(found.bytes)}" if found.bytes else "")


def _allocation(found: AllocationPlan, parameters: int) -> list[str]:
    """What is measured, and between which sizes the result lies."""
    words = ", ".join(candidate_words(keys) for keys in found.candidates)
    sizes = (found.smallest_bytes, found.largest_bytes, found.asked_bytes)
    low, high, asked = (f"{decimal(size)} ({8 * size / parameters:.2f} bits per weight)" for size in sizes)
    return [
        f"{count(found.units, 'unit')} of layers are measured with each of {words}; the least costly choice is taken",
        f"{asked} of {found.counted} are asked for; there is {low} to {high}. Below is one choice of that size",
    ]


def _ratios(found: RatiosPlan) -> str:
    """What is found by measuring, and what the sizes below are of."""
    what = "numbers to save" if found.name in ("spectrum", "similarity") else "weights to drop"
    words = f"{found.name} finds {count(found.units, 'share')} of {what}, {share(found.sparsity)} of all"
    if found.name == "similarity":
        return f"{words}; sizes below are those of one choice that saves as much"
    return f"{words}; sizes below are those of equal shares, which differ by rounding alone"


def _plan_table(plan: Plan) -> Table:
    table = _table("layers", "count", "shape", "how", "before", "after", right=("count", "before", "after"))
    kinds: dict[tuple[str, str], list[LayerPlan]] = {}
    for layer in plan.layers:
        kinds.setdefault((_kind(layer.name), _how(layer)), []).append(layer)
    for (kind, how), layers in kinds.items():
        shapes = {_shape(layer) for layer in layers}
        table.add_row(
            Text(kind),
            str(len(layers)),
            shapes.pop() if len(shapes) == 1 else "various",
            Text(how, style="" if layers[0].method else "dim"),
            decimal(sum(layer.bytes_before for layer in layers)),
            decimal(sum(layer.bytes_after for layer in layers)),
        )
    others: dict[str, list[TensorPlan]] = {}
    for tensor in plan.others:
        others.setdefault(_kind(tensor.name.removesuffix(".weight")), []).append(tensor)
    largest = sorted(others.items(), key=lambda item: -sum(tensor.bytes_after for tensor in item[1]))
    for kind, tensors in largest[:OTHERS_SHOWN]:
        table.add_row(Text(kind), *_other(tensors))
    if rest := [tensor for _, tensors in largest[OTHERS_SHOWN:] for tensor in tensors]:
        table.add_row("other tensors", *_other(rest))
    return table


def _shape(layer: LayerPlan) -> str:
    before, after = ("x".join(map(str, shape)) for shape in (layer.shape_before or layer.shape, layer.shape))
    return after if before == after else f"{before} -> {after}"


def _other(tensors: list[TensorPlan]) -> list[RenderableType]:
    before, after = (sum(getattr(t, name) for t in tensors) for name in ("bytes_before", "bytes_after"))
    how = "copied" if before == after else "decoded" if before < after else "cut"
    return [str(len(tensors)), "", Text(how, "dim"), decimal(before), decimal(after)]


def _kind(name: str) -> str:
    """A layer's name within its block, with any other number as a star: `mlp.experts.*.down_proj`."""
    starred = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", clean(name))
    return starred.partition(".*.")[2] or starred


def _how(layer: LayerPlan) -> str:
    if layer.method is None:
        return "left as it is"
    if layer.open:
        return clean(f"{_method(layer.method)}, by measuring")
    if layer.type is not None:
        return clean(f"{_method(layer.method)} {layer.type}")
    group = {None: "", -1: " per channel"}.get(layer.group_size, f" g{layer.group_size}")
    bits = "" if layer.bits is None else f" W{layer.bits}"
    return clean(f"{_method(layer.method)}{bits}{group}")


def _method(name: str) -> str:
    return "same codes" if name == "keep" else name


def _comparison(report: Report) -> Table:
    if report.after is None and not any(stage.layers for stage in report.stages):  # one model, measured as it is
        table = _table("", "measured", right=("measured",))
        for row in comparison(report):
            table.add_row(Text(row.label), Text(row.before, style="dim" if row.before == NOT_MEASURED else ""))
        return table
    table = _table("", "before", "after", "change", right=("before", "after", "change"))
    for row in comparison(report):
        cells = [Text(cell, style="dim" if cell == NOT_MEASURED else "") for cell in (row.before, row.after)]
        table.add_row(Text(row.label), *cells, row.change)
    return table


def _samples(report: Report) -> list[RenderableType]:
    found = [(m.label, m.sample) for m in (report.before, report.after) if m is not None and m.sample is not None]
    if not found:
        return []
    return [_heading("A sample"), *(_line(f"{clean(label)}: {clean(sample)}") for label, sample in found)]


def _checks_in_short(checks: Sequence[Check]) -> RenderableType:
    failed = [check for check in checks if check.passed is False]
    if failed:
        return Group(_line(f"{len(failed)} of {count(len(checks), 'check')} FAILED", "red"), render_checks(failed))
    passed = [clean(check.name) for check in checks if check.passed]
    skipped = [check for check in checks if check.passed is None]
    lines = [_line(f"{count(len(passed), 'check')} passed: {', '.join(passed)}", "green")]
    lines += [_line(f"{clean(check.name)} was not run: {clean(check.detail)}", "yellow") for check in skipped]
    return Group(*lines)


def _gates(gates: Sequence[GateReport]) -> RenderableType:
    table = _table("", "gate", "asked", "measured", "where", right=("measured",))
    for gate in gates:
        name, limit, value = gate_cells(gate)
        table.add_row(_verdict(gate.passed), Text(name), limit, value, Text(clean(gate.detail)))
    return table


def _events(events: Sequence[EventRecord]) -> list[RenderableType]:
    if not events:
        return []
    return [_heading("Worth knowing"), *(_line(text, "yellow") for text in grouped_events(events))]


def _runtimes(rows: Sequence[tuple[str, Support, str, str]]) -> Table:
    table = _table("runtime", "support", "why", "known from")
    for runtime, support, reason, known in rows:
        table.add_row(Text(clean(runtime)), Text(support, style=COLOURS[support]), Text(clean(reason)), clean(known))
    return table


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _verdict(passed: bool | None) -> Text:
    if passed is None:
        return Text("not run", style="yellow")
    return Text("ok", style="green") if passed else Text("FAILED", style="red")


def _heading(text: str) -> RenderableType:
    return Padding(Text(text, style="bold"), (1, 0, 0, 0))


def _line(text: str, style: str = "") -> RenderableType:
    return Padding(Text(text, style=style), (0, 0, 0, 2))


__all__ = ["render", "render_checks", "render_plan"]
