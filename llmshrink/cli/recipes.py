"""`llmshrink recipes`: list, show, copy and check recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmshrink.cli import console
from llmshrink.cli.options import Json, Quiet, complete_recipe

app = typer.Typer(no_args_is_help=True, help="List, show, copy and check recipes.")

Name = Annotated[str, typer.Argument(help="A built-in recipe or a YAML file.", autocompletion=complete_recipe)]


@app.command("ls")
def list_recipes(as_json: Json = False) -> None:
    """List the built-in recipes."""
    from llmshrink.recipe.load import built_in, summary

    rows = [
        {"name": name, "task": path.parent.name, "summary": summary(path), "path": str(path)}
        for name, path in built_in().items()
    ]
    if as_json:
        console.show_json(rows)
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("name", "task", "summary"):
        table.add_column(column, no_wrap=column == "name")
    for row in rows:
        table.add_row(row["name"], row["task"], row["summary"])
    console.show(table)


@app.command()
def show(
    name: Name, full: Annotated[bool, typer.Option("--full", help="With all defaults written out.")] = False
) -> None:
    """Print a recipe."""
    from llmshrink.recipe import load

    print(load.dump(load.load(name)) if full else console.visible(load.read_text(load.resolve_name(name))), end="")


@app.command("cp")
def copy(
    name: Name,
    target: Annotated[Path | None, typer.Argument(help="File or folder; default: here.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Copy a recipe, to change it."""
    from llmshrink.errors import OutputError
    from llmshrink.recipe import load

    source = load.resolve_name(name)
    path = target or Path()
    path = path / source.name if path.is_dir() else path
    lines = load.read_text(source).splitlines(keepends=True)
    # The schema lies beside the built-in recipes, not beside the copy.
    content = "".join(line for line in lines if not line.startswith("# yaml-language-server:"))
    try:
        with path.open("w" if overwrite else "x", encoding="utf-8") as file:
            file.write(content)
    except FileExistsError:
        raise OutputError(f"{path} exists", hint="--overwrite replaces it") from None
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}") from None
    print(path)


@app.command()
def validate(
    names: Annotated[list[str], typer.Argument(help="Recipes to check.", autocompletion=complete_recipe)],
    quiet: Quiet = False,
) -> None:
    """Check recipes; all problems of all of them are told."""
    from llmshrink.errors import RecipeError
    from llmshrink.recipe.load import load

    refused = 0
    problems: list[str] = []
    for name in names:
        try:
            load(name)
        except RecipeError as error:
            refused += 1
            problems += [f"{name}: {problem}" for problem in error.problems] or [error.message]
        else:
            if not quiet:
                print(f"{name}: ok")
    if refused:
        raise RecipeError(f"{refused} of {len(names)} recipes refused", problems)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from llmshrink.recipe.json_schema import json_schema

    console.show_json(json_schema())
