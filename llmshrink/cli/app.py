"""The commands: each parses, calls the library, prints, and leaves with a documented exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmshrink import __version__, ranks
from llmshrink.cli import adapters, console, recipes
from llmshrink.cli import options as opt
from llmshrink.cli.progress import listener
from llmshrink.errors import GateError, LlmshrinkError, UsageError

if TYPE_CHECKING:
    from llmshrink.recipe.schema import Recipe
    from llmshrink.report.schema import Check, Report

EPILOG = (
    "Exit codes: 0 ok, 1 internal error, 2 usage, 3 recipe or plan refused, 4 model not found, 5 refused for safety, "
    "6 not enough memory or disk, 7 output exists or is locked, 8 bad input, 9 a check, a gate or --strict failed, "
    "12 interrupted and resumable, 130 interrupted."
)

TRAINING = ("distill", "lora", "run")  # commands that several processes can share

app = typer.Typer(
    name="llmshrink",
    help="Make a language model smaller, and prove what it cost.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _common(
    revision: opt.Revision = None,
    output: opt.Output = None,
    set: opt.Set = None,  # noqa: A002 - the option's name
    calibration: opt.Calibration = None,
    samples: opt.Samples = None,
    length: opt.Length = None,
    seed: opt.Seed = None,
    evaluation: opt.Evaluation = None,
    max_ppl_increase: opt.MaxPplIncrease = None,
    max_kl: opt.MaxKl = None,
    min_top1: opt.MinTop1 = None,
    max_size: opt.MaxSize = None,
    device: opt.Device = None,
    threads: opt.Threads = None,
    memory: opt.Memory = None,
    sequential: opt.Sequential = None,
    strict: opt.Strict = None,
    resume: opt.Resume = None,
    overwrite: opt.Overwrite = False,
    plan: opt.Plan = False,
    smoke: opt.Smoke = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """The options that all commands have which compress a model."""


def _compresses(command: Callable[..., None]) -> Callable[..., None]:
    """A command with its own options and, behind them, those of `_common`; its name is the task, which `_work` does."""

    def work(**given: Any) -> None:
        _work(command.__name__, **given)

    work.__name__, work.__doc__ = command.__name__, command.__doc__
    own, common = (signature(each, eval_str=True).parameters for each in (command, _common))
    parameters = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in {**own, **common}.values()]
    work.__signature__ = Signature(parameters)  # type: ignore[attr-defined] # typer reads both
    work.__annotations__ = {each.name: each.annotation for each in parameters}
    return work


@app.command(rich_help_panel="Work")
@_compresses
def quantize(
    ctx: typer.Context,
    model: opt.Model = None,
    recipe: opt.RecipeName = None,
    method: opt.Method = None,
    preset: opt.Preset = None,
    bits: opt.Bits = None,
    group_size: opt.GroupSize = None,
    symmetric: opt.Symmetric = None,
    inputs: opt.Inputs = None,
    transform: opt.Transform = None,
    format: opt.Format = None,  # noqa: A002 - the option's name
    type: opt.Type = None,  # noqa: A002 - the option's name
    target_size: opt.TargetSize = None,
    target_bpw: opt.TargetBpw = None,
) -> None:
    """Store a model's weights in fewer bits, verify the result, and measure what it cost."""


@app.command(rich_help_panel="Work")
@_compresses
def prune(
    ctx: typer.Context,
    model: opt.Model = None,
    recipe: opt.RecipeName = None,
    method: opt.Method = None,
    preset: opt.Preset = None,
    sparsity: opt.Sparsity = None,
    pattern: opt.Pattern = None,
    ratios: opt.Ratios = None,
    bits: opt.KeptBits = None,
    group_size: opt.GroupSize = None,
    symmetric: opt.Symmetric = None,
    neurons: opt.Neurons = None,
    heads: opt.Heads = None,
    hidden: opt.HiddenWidth = None,
    experts: opt.Experts = None,
    layers: opt.Layers = None,
    target_params: opt.TargetParams = None,
    format: opt.Format = None,  # noqa: A002 - the option's name
    target_size: opt.TargetSize = None,
    target_bpw: opt.TargetBpw = None,
) -> None:
    """Drop weights, store what is left without the zeros, verify the result, and measure what it cost."""


@app.command(rich_help_panel="Work")
@_compresses
def cluster(
    ctx: typer.Context,
    model: opt.Model = None,
    recipe: opt.RecipeName = None,
    preset: opt.Preset = None,
    bits: opt.CodeBits = None,
    targets: opt.Targets = None,
    transform: opt.Transform = None,
    format: opt.Format = None,  # noqa: A002 - the option's name
    pack: opt.Pack = None,
    target_size: opt.TargetSize = None,
    target_bpw: opt.TargetBpw = None,
) -> None:
    """Let weights share a few values, store which, verify the result, and measure what it cost."""


@app.command(rich_help_panel="Work")
@_compresses
def factorize(
    ctx: typer.Context,
    model: opt.Model = None,
    recipe: opt.RecipeName = None,
    preset: opt.Preset = None,
    method: opt.Method = None,
    keep: opt.Keep = None,
    rank: opt.Rank = None,
    bits: opt.RestBits = None,
    targets: opt.Targets = None,
    transform: opt.Transform = None,
    format: opt.Format = None,  # noqa: A002 - the option's name
    pack: opt.Pack = None,
    target_size: opt.TargetSize = None,
    target_bpw: opt.TargetBpw = None,
) -> None:
    """Make products of thin matrices, alone or beside codes, verify the result, and measure what it cost."""


@app.command(rich_help_panel="Work")
@_compresses
def distill(
    ctx: typer.Context,
    model: opt.Model = None,
    recipe: opt.RecipeName = None,
    teacher: opt.Teacher = None,
    neurons: opt.Neurons = None,
    heads: opt.Heads = None,
    hidden: opt.HiddenWidth = None,
    experts: opt.Experts = None,
    layers: opt.Layers = None,
    target_params: opt.TargetParams = None,
    qat: opt.Qat = None,
    method: opt.Method = None,
    bits: opt.Bits = None,
    group_size: opt.GroupSize = None,
    symmetric: opt.Symmetric = None,
    format: opt.Format = None,  # noqa: A002 - the option's name
    loss: opt.Loss = None,
    temperature: opt.Temperature = None,
    alpha: opt.Alpha = None,
    cache: opt.Cache = None,
    cache_folder: opt.CacheFolder = None,
    cache_only: opt.CacheOnly = False,
    data: opt.Data = None,
    batch: opt.Batch = None,
    rate: opt.Rate = None,
    max_steps: opt.MaxSteps = None,
    max_tokens: opt.MaxTokens = None,
    max_minutes: opt.MaxMinutes = None,
    report_to: opt.ReportTo = None,
) -> None:
    """Train a smaller model towards what a larger one says, verify the result, and measure what it cost."""


@app.command(rich_help_panel="Work")
@_compresses
def lora(
    ctx: typer.Context,
    model: opt.Model = None,
    recipe: opt.RecipeName = None,
    method: opt.AdapterKind = None,
    rank: opt.AdapterRank = None,
    linears: opt.AdapterTarget = None,
    merge: opt.Merge = None,
    label: opt.Label = None,
    data: opt.Data = None,
    batch: opt.Batch = None,
    rate: opt.Rate = None,
    max_steps: opt.MaxSteps = None,
    max_tokens: opt.MaxTokens = None,
    max_minutes: opt.MaxMinutes = None,
    report_to: opt.ReportTo = None,
) -> None:
    """Learn a text by a small adapter beside a model, verify it, and measure what it gained."""


@app.command("run", rich_help_panel="Work")
def run_stages(
    ctx: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or a file.")],
    model: opt.Model = None,
    revision: opt.Revision = None,
    output: opt.Output = None,
    set: opt.Set = None,  # noqa: A002 - the option's name
    data: opt.Data = None,
    calibration: opt.Calibration = None,
    samples: opt.Samples = None,
    length: opt.Length = None,
    seed: opt.Seed = None,
    evaluation: opt.Evaluation = None,
    device: opt.Device = None,
    threads: opt.Threads = None,
    memory: opt.Memory = None,
    strict: opt.Strict = None,
    resume: opt.Resume = None,
    overwrite: opt.Overwrite = False,
    plan: opt.Plan = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Carry out a recipe, of one stage or of several, each of which goes on with what the one before made."""
    wanted = opt.build_recipe("run", ctx.params)
    _tell_default(wanted.model.id, quiet)
    if plan:
        if (later := len(wanted.stages) - 1) and not quiet:
            console.say(f"stage 1; {later} more: they are planned on what the stages before them make")
        _plan(wanted, json=json)
        return
    report = _execute(wanted, quiet=quiet, verbose=verbose, overwrite=overwrite)
    _finish(report, json=json, table=not quiet, path=report.output is not None)


@app.command(rich_help_panel="Work")
def export(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Hub id or folder of a quantized model.")] = None,
    to: opt.To = None,
    pack: opt.Pack = None,
    recipe: opt.RecipeName = None,
    revision: opt.Revision = None,
    output: opt.Output = None,
    set: opt.Set = None,  # noqa: A002 - the option's name
    evaluation: opt.Evaluation = None,
    max_ppl_increase: opt.MaxPplIncrease = None,
    max_kl: opt.MaxKl = None,
    min_top1: opt.MinTop1 = None,
    max_size: opt.MaxSize = None,
    device: opt.Device = None,
    threads: opt.Threads = None,
    memory: opt.Memory = None,
    strict: opt.Strict = None,
    resume: opt.Resume = None,
    overwrite: opt.Overwrite = False,
    plan: opt.Plan = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Write a quantized model, whoever made it, in another format: the same codes, or dense weights."""
    if recipe is None and model is None:
        raise UsageError("name the model to export: a folder or a Hub id")
    if recipe is None and to is None:
        raise UsageError("say which format to write: --to dense, gptq, awq, compressed-tensors or bnb")
    wanted = opt.build_recipe("export", ctx.params)
    if recipe is None and not evaluation and wanted.evaluation.data and not quiet:
        console.say("a gate asks for measures: evaluated on `auto` text (--evaluation names another)")
    if plan:
        _plan(wanted, json=json)
    else:
        report = _execute(wanted, quiet=quiet, verbose=verbose, overwrite=overwrite)
        _finish(report, json=json, table=not quiet, path=True)


@app.command("eval", rich_help_panel="Work")
def evaluate(
    ctx: typer.Context,
    model: opt.Model = None,
    recipe: opt.RecipeName = None,
    revision: opt.Revision = None,
    set: opt.Set = None,  # noqa: A002 - the option's name
    evaluation: opt.Evaluation = None,
    baseline: opt.Baseline = None,
    rows: opt.Rows = None,
    row_length: opt.RowLength = None,
    max_ppl_increase: opt.MaxPplIncrease = None,
    max_kl: opt.MaxKl = None,
    min_top1: opt.MinTop1 = None,
    max_size: opt.MaxSize = None,
    device: opt.Device = None,
    threads: opt.Threads = None,
    memory: opt.Memory = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Measure a model: perplexity, size, speed, memory; with --baseline its divergence from another."""
    wanted = opt.build_recipe("eval", ctx.params)
    _tell_default(wanted.model.id, quiet)
    report = _execute(wanted, quiet=quiet, verbose=verbose)
    _finish(report, json=json)


@app.command(rich_help_panel="Work")
def plan(
    ctx: typer.Context,
    model: opt.Model = None,
    recipe: opt.RecipeName = None,
    method: opt.Method = None,
    preset: opt.Preset = None,
    bits: opt.Bits = None,
    group_size: opt.GroupSize = None,
    symmetric: opt.Symmetric = None,
    inputs: opt.Inputs = None,
    transform: opt.Transform = None,
    format: opt.Format = None,  # noqa: A002 - the option's name
    type: opt.Type = None,  # noqa: A002 - the option's name
    target_size: opt.TargetSize = None,
    target_bpw: opt.TargetBpw = None,
    revision: opt.Revision = None,
    output: opt.Output = None,
    set: opt.Set = None,  # noqa: A002 - the option's name
    calibration: opt.Calibration = None,
    samples: opt.Samples = None,
    length: opt.Length = None,
    seed: opt.Seed = None,
    evaluation: opt.Evaluation = None,
    max_ppl_increase: opt.MaxPplIncrease = None,
    max_kl: opt.MaxKl = None,
    min_top1: opt.MinTop1 = None,
    max_size: opt.MaxSize = None,
    device: opt.Device = None,
    threads: opt.Threads = None,
    memory: opt.Memory = None,
    sequential: opt.Sequential = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Show what quantize would do to every layer, with bytes and memory, without doing it."""
    wanted = opt.build_recipe("quantize", ctx.params)
    _tell_default(wanted.model.id, quiet)
    _plan(wanted, json=json)


@app.command(rich_help_panel="Look")
def measure(
    ctx: typer.Context,
    model: opt.Model = None,
    recipe: opt.RecipeName = None,
    method: opt.Method = None,
    group_size: opt.GroupSize = None,
    symmetric: opt.Symmetric = None,
    format: opt.Format = None,  # noqa: A002 - the option's name
    revision: opt.Revision = None,
    set: opt.Set = None,  # noqa: A002 - the option's name
    calibration: opt.Calibration = None,
    samples: opt.Samples = None,
    length: opt.Length = None,
    seed: opt.Seed = None,
    device: opt.Device = None,
    threads: opt.Threads = None,
    memory: opt.Memory = None,
    save: Annotated[
        Path | None, typer.Option(help="A JSON file to write; a plot goes beside it, as FILE.svg.", metavar="FILE")
    ] = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Show what fewer bits cost in each layer: what --target-size and --target-bpw choose by."""
    from llmshrink import run
    from llmshrink.report.sensitivity import render

    wanted = opt.build_recipe("quantize", ctx.params)
    _tell_default(wanted.model.id, quiet)
    with listener(quiet=quiet, verbose=verbose) as progress:
        found = run.measure(wanted, progress=progress, save=save)
    if json:
        console.show_json(found.model_dump(mode="json"))
    elif not quiet:
        console.show(render(found))


@app.command(rich_help_panel="Look")
def compare(
    results: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Results of llmshrink, of one model.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="A table for a comment in CI.")] = False,
    json: opt.Json = False,
) -> None:
    """Put results side by side: what each takes and keeps, and which of them no other beats."""
    from llmshrink.report import compare as side

    names = [path.name or path.resolve().name for path in results]
    labels = names if len(set(names)) == len(names) else [str(path) for path in results]
    if len(set(labels)) < len(labels):
        raise UsageError("a result is named twice")
    found = side.compare({label: side.read_report(path) for label, path in zip(labels, results, strict=True)})
    if json:
        console.show_json(found.model_dump(mode="json"))
    elif markdown:
        print(side.markdown(found), end="")
    else:
        console.show(side.table(found))
        for line in side.notes(found):
            print(line)


@app.command(rich_help_panel="Look")
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A result of llmshrink.")],
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Check a finished result: every file as it was written, every tensor decoded, and that transformers loads it."""
    from llmshrink import run

    with listener(quiet=quiet, verbose=verbose) as progress:
        checks = run.verify(folder, progress=progress)
    _show_checks(checks, json=json)


@app.command(rich_help_panel="Look")
def env(json: opt.Json = False) -> None:
    """Show versions and devices, for reports of faults."""
    from llmshrink import run

    found = run.environment()
    if json:
        console.show_json(found)
    else:
        for name, value in found.items():
            print(f"{name}: {value}")


app.add_typer(adapters.app, name="adapters", rich_help_panel="Work")
app.add_typer(recipes.app, name="recipes", rich_help_panel="Look")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; `arguments` are those of the process unless given.

    Returns:
        The exit code, as in `llmshrink.errors`.
    """
    with console.redacted_streams():
        given = list(sys.argv[1:] if arguments is None else arguments)
        try:
            return _run(given, lambda: _call(given)) if ranks.count() == 1 else _together(given)
        except KeyboardInterrupt:  # while an error was told: whoever asks twice wants no more words
            return 130


def _call(given: list[str]) -> int:
    """Carry out a command line."""
    asked = given[0] if given and not given[0].startswith("-") else None
    if ranks.count() > 1 and asked not in (None, *TRAINING):
        raise UsageError(
            f"llmshrink {asked} works in one process, and {ranks.count()} were launched",
            hint=f"Leave out the launcher; it is for {', '.join(TRAINING)}.",
        )
    if ranks.left_alone() and asked in TRAINING:
        raise UsageError(
            "several processes were asked for, and one was started: `accelerate launch --cpu` needs MPI for more",
            hint="Launch with --multi_gpu in place of --cpu, which needs no GPU, or by "
            "`python -m torch.distributed.run --nproc-per-node N -m llmshrink ...`.",
        )
    code: int | None = app(args=given, prog_name="llmshrink", standalone_mode=False)
    return code or 0


def _together(given: list[str]) -> int:
    """One of several processes: the first carries out the command line, the others train along with it."""
    from llmshrink import run

    ranks.meet()
    if not ranks.first():
        return _run(given, run.follow)
    code = LlmshrinkError.exit_code
    try:
        code = _run(given, lambda: _call(given))
        return code
    finally:
        ranks.dismiss(code)


def _run(given: list[str], work: Callable[[], int]) -> int:
    """The exit code of some work; what goes wrong is told as the command line asks."""
    as_json = "--json" in given
    verbose = "--verbose" in given or "-v" in given
    try:
        return work()
    except LlmshrinkError as error:
        console.report_error(error, error.exit_code, str(error), as_json=as_json, verbose=verbose)
        return error.exit_code
    except typer.TyperException as error:
        message = error.format_message()
        if message:  # none where the help page is the answer
            console.report_error(error, error.exit_code, message, as_json=as_json, verbose=False)
        return error.exit_code
    except Exception as error:
        hint = "" if verbose else "\n  run it again with --verbose to see the traceback"
        message = f"internal error: {type(error).__name__}: {error}{hint}"
        console.report_error(error, LlmshrinkError.exit_code, message, as_json=as_json, verbose=verbose)
        return LlmshrinkError.exit_code


def _work(
    task: str,
    *,
    ctx: typer.Context,
    plan: bool,
    smoke: bool,
    json: bool,
    quiet: bool,
    verbose: bool,
    overwrite: bool,
    cache_only: bool = False,
    **_: object,
) -> None:
    """A command that compresses matrices: as asked, only planned, or tried on one block; all else is in `ctx`."""
    if plan and smoke:
        raise UsageError("--plan and --smoke are two questions: ask one at a time")
    wanted = opt.build_recipe(task, ctx.params)
    _tell_default(wanted.model.id, quiet)
    if plan:
        _plan(wanted, json=json)
    elif cache_only:
        _keep(wanted, json=json, quiet=quiet, verbose=verbose)
    elif smoke:
        _smoke(wanted, json=json, quiet=quiet, verbose=verbose)
    else:
        report = _execute(wanted, quiet=quiet, verbose=verbose, overwrite=overwrite)
        _finish(report, json=json, table=not quiet, path=True)


def _keep(wanted: Recipe, *, json: bool, quiet: bool, verbose: bool) -> None:
    from llmshrink import run
    from llmshrink.report import rows

    with listener(quiet=quiet, verbose=verbose) as progress:
        found = run.keep(wanted, progress=progress)
    if json:
        console.show_json(found.model_dump(mode="json"))
    elif not quiet:
        print(rows.cached(found))


def _tell_default(model: str | None, quiet: bool) -> None:
    if model is None and not quiet:
        console.say("no model named: using the one inside llmshrink")


def _plan(wanted: Recipe, *, json: bool) -> None:
    from llmshrink import run
    from llmshrink.report import table

    found = run.make_plan(wanted)
    if json:
        console.show_json(found.model_dump(mode="json"))
    else:
        console.show(table.render_plan(found))
    run.check_size(found)


def _smoke(wanted: Recipe, *, json: bool, quiet: bool, verbose: bool) -> None:
    from llmshrink import run

    with listener(quiet=quiet, verbose=verbose) as progress:
        checks = run.smoke(wanted, progress=progress)
    _show_checks(checks, json=json)


def _execute(wanted: Recipe, *, quiet: bool, verbose: bool, overwrite: bool = False) -> Report:
    from llmshrink import run

    with listener(quiet=quiet, verbose=verbose) as progress:
        command = ["llmshrink", *sys.argv[1:]]
        return run.execute(wanted, progress=progress, overwrite=overwrite, command=command)


def _finish(report: Report, *, json: bool, table: bool = True, path: bool = False) -> None:
    """Show the report and, as the last line, where the result is; then fail by its gates, or if it is strict."""
    from llmshrink import run
    from llmshrink.report.table import render

    if json:
        console.show_json(report.model_dump(mode="json"))
    elif table:
        console.show(render(report))
    if path and not json:
        print(report.output)
    run.check_gates(report)


def _show_checks(checks: Sequence[Check], *, json: bool) -> None:
    from llmshrink.report import table

    failed = [check.name for check in checks if check.passed is False]
    if json:
        console.show_json({"passed": not failed, "checks": [check.model_dump(mode="json") for check in checks]})
    else:
        console.show(table.render_checks(checks))
    if failed:
        raise GateError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")
