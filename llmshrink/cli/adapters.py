"""`llmshrink adapters`: list, compare and merge what `llmshrink lora` learned, or peft."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmshrink.cli import console
from llmshrink.cli.options import Evaluation, Json, Overwrite, Quiet, RowLength, Rows, Verbose
from llmshrink.cli.progress import listener
from llmshrink.errors import UsageError

app = typer.Typer(no_args_is_help=True, help="List, compare and merge adapters.")

Folders = Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of adapters.")]
Base = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id or folder of the model they are for.")]


@app.command("ls")
def list_adapters(folders: Folders, json: Json = False) -> None:
    """Show what each adapter is: its kind, its model, its size, and what it learned."""
    from rich.filesize import decimal
    from rich.table import Table

    from llmshrink import adapters
    from llmshrink.report.rows import clean

    found = [adapters.look(folder) for folder in folders]
    if json:
        console.show_json(adapters.as_data(found))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("adapter", "kind", "rank", "for", "model", "size", "learned from", "loss on rows held back"):
        table.add_column(column)
    for one in found:
        learned = "" if one.tokens is None else f"{one.tokens:,} tokens"
        held = "" if one.held_after is None else f"{one.held_before:.4f} -> {one.held_after:.4f}"
        table.add_row(
            clean(one.folder), clean(one.kind), str(one.rank or ""), clean(one.task or ""),
            clean(one.own or one.base or ""), decimal(one.bytes), learned, held,
        )  # fmt: skip
    console.show(table)


@app.command()
def compare(
    model: Base,
    folders: Folders,
    evaluation: Evaluation = None,
    rows: Rows = None,
    row_length: RowLength = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure a model alone and with each adapter: they are switched in one copy of it."""
    from rich.table import Table

    from llmshrink import adapters
    from llmshrink.recipe.schema import EvaluationSpec

    spec = EvaluationSpec(data=list(evaluation or ["auto"]), rows=rows or 64, length=row_length)
    with listener(quiet=quiet, verbose=verbose) as progress:
        found = adapters.compare(model, folders, spec, progress=progress)
    if json:
        console.show_json(found)
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("perplexity")
    for line in found:
        table.add_column(line["text"], justify="right")
    for name in ("", *map(str, folders)):
        table.add_row(name or "the model alone", *(f"{line[name]:.3f}" for line in found))
    console.show(table)


@app.command()
def merge(
    model: Base,
    parts: Annotated[list[str], typer.Argument(metavar="DIR[=WEIGHT]...", help="Adapters, each with its weight: 1.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the result.")],
    how: Annotated[
        str, typer.Option(help="cat (the exact sum), svd, linear, ties, dare_ties, dare_linear, magnitude_prune.")
    ] = "cat",
    into: Annotated[bool, typer.Option("--into", help="Write the whole model with them in its weights.")] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Make one adapter of several, or put them into the weights of their model."""
    from llmshrink import adapters
    from llmshrink.report.table import render_checks

    found = [_weighed(part) for part in parts]
    checks, events = adapters.combine(model, found, output, how=how, into=into, overwrite=overwrite)
    if not quiet:
        for event in events:
            console.say(f"{event.kind}: {event.message}")
        console.show(render_checks(checks))
    print(output)


def _weighed(part: str) -> tuple[Path, float]:
    folder, equals, weight = part.rpartition("=")
    if not equals or Path(part).is_dir():
        return Path(part), 1.0
    try:
        return Path(folder), float(weight)
    except ValueError:
        raise UsageError(f"{part}: write it as DIR=WEIGHT, with a number", hint="e.g. out/a=0.7") from None
