"""The options that commands share. Most are names for recipe keys: RECIPE_KEYS says which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from llmshrink.recipe.schema import Recipe

RECIPE_KEYS = {
    "model": "model.id",
    "revision": "model.revision",
    "method": "method.name",
    "bits": "method.bits",
    "group_size": "method.group_size",
    "symmetric": "method.symmetric",
    "sparsity": "method.sparsity",
    "pattern": "method.pattern",
    "ratios": "ratios.name",
    "targets": "targets",
    "keep": "method.keep",
    "rank": "method.rank",
    "neurons": "cut.neurons",
    "heads": "cut.heads",
    "hidden": "cut.hidden",
    "experts": "cut.experts",
    "layers": "cut.layers",
    "target_params": "cut.params",
    "teacher": "teacher",
    "linears": "target",
    "label": "label",
    "merge": "merge",
    "loss": "loss.name",
    "temperature": "loss.temperature",
    "alpha": "loss.alpha",
    "cache": "cache.method",
    "cache_folder": "cache.folder",
    "data": "train.data",
    "batch": "train.batch",
    "rate": "train.rate",
    "max_steps": "train.max_steps",
    "max_tokens": "train.max_tokens",
    "max_minutes": "train.max_minutes",
    "report_to": "train.report_to",
    "inputs": "inputs.type",
    "transform": "transform",
    "format": "format.name",
    "to": "format.name",
    "pack": "format.pack",
    "type": "format.type",
    "target_size": "allocate.size",
    "target_bpw": "allocate.bpw",
    "calibration": "calibration.data",
    "samples": "calibration.samples",
    "length": "calibration.length",
    "seed": "calibration.seed",
    "evaluation": "evaluation.data",
    "rows": "evaluation.rows",
    "row_length": "evaluation.length",
    "baseline": "evaluation.baseline",
    "max_ppl_increase": "gate.max_ppl_increase",
    "max_kl": "gate.max_kl",
    "min_top1": "gate.min_top1",
    "max_size": "gate.max_size",
    "device": "run.device",
    "threads": "run.threads",
    "memory": "run.memory",
    "sequential": "run.sequential",
    "strict": "run.strict",
    "resume": "run.resume",
    "output": "output",
}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {  # what each effort means, by what a stage does
    "fast": {
        "quantize": {"method.name": "rtn", "reconstruct": None, "tune": None},
        "prune": {"method.name": "magnitude", "reconstruct": None},
        "cut": {"cut.repair": False, "reconstruct": None},
        "cluster": {"method.weighting": "none", "reconstruct": None},
        "factorize": {"method.name": "svd", "reconstruct": None},
    },
    "balanced": {
        "quantize": {"reconstruct": None, "tune": None},
        "prune": {"reconstruct": None},
        "cut": {"reconstruct": None},
        "cluster": {"reconstruct": None},
        "factorize": {"reconstruct": None},
    },
    "best": {
        "quantize": {"reconstruct": {}, "tune": {"optional": True}},
        "prune": {"reconstruct": {}},
        "cut": {"reconstruct": {}},
        "cluster": {"reconstruct": {}},
        "factorize": {"reconstruct": {}},
    },
}
WRITING = ("quantize", "prune", "cluster", "factorize", "distill", "lora", "export")  # commands
CALIBRATING = ("calibration", "samples", "length", "seed", "sequential")  # flags
QUALITY_GATES = ("max_ppl_increase", "max_kl", "min_top1")
_WHAT, _TEXT, _GATES, _HOW, _SHOW = "What", "Text", "Gates (exit 9)", "How", "Show"  # panels of the help page
_PARTS = "Whole parts: smaller tensors that load everywhere"
_LEARN = "Learning"


def complete_recipe(incomplete: str) -> list[tuple[str, str]]:
    """Names of built-in recipes with their summaries."""
    from llmshrink.recipe.load import built_in, summary

    return [(name, summary(path)) for name, path in built_in().items() if name.startswith(incomplete)]


def complete_method(incomplete: str) -> list[str]:
    """Names of methods."""
    from llmshrink.recipe.method import method_names

    return [name for name in method_names() if name.startswith(incomplete)]


def complete_transform(incomplete: str) -> list[str]:
    """Names of transforms."""
    from llmshrink.recipe.method import transform_names

    return [name for name in transform_names() if name.startswith(incomplete)]


def complete_format(incomplete: str) -> list[str]:
    """Names of checkpoint formats."""
    from llmshrink.recipe.method import format_names

    return [name for name in format_names() if name.startswith(incomplete)]


def complete_adapter(incomplete: str) -> list[str]:
    """Names of adapters."""
    from llmshrink.recipe.adapter import USUAL

    return [name for name in USUAL if name.startswith(incomplete)]


def complete_type(incomplete: str) -> list[str]:
    """Names of GGUF mixes."""
    from llmshrink.recipe.method import MIXES

    return [name for name in MIXES if name.startswith(incomplete.upper())]


Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="Hub id or folder; without it the model inside llmshrink.")
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        help="A built-in recipe or a YAML file.",
        autocompletion=complete_recipe,
        rich_help_panel=_WHAT,
    ),
]
Method = Annotated[
    str | None, typer.Option(help="The algorithm.", autocompletion=complete_method, rich_help_panel=_WHAT)
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="How much effort: fast (no text), balanced (the default), or best (learned by gradient).",
        metavar="|".join(PRESETS),
        rich_help_panel=_WHAT,
    ),
]
Bits = Annotated[int | None, typer.Option(help="Bits per weight: 2, 3, 4 or 8.", rich_help_panel=_WHAT)]
CodeBits = Annotated[
    int | None, typer.Option("--bits", help="Bits of a code, 1 to 8: 2^bits values.", rich_help_panel=_WHAT)
]
Keep = Annotated[
    float | None,
    typer.Option(help="Share of the numbers of all matrices to keep: 0.8.", metavar="SHARE", rich_help_panel=_WHAT),
]
Rank = Annotated[int | None, typer.Option(help="Rank of every product.", rich_help_panel=_WHAT)]
RestBits = Annotated[
    int | None,
    typer.Option("--bits", help="Bits of codes for what a product leaves, 1 to 8.", rich_help_panel=_WHAT),
]
GroupSize = Annotated[
    int | None, typer.Option(help="Weights that share a scale; -1: a whole row.", rich_help_panel=_WHAT)
]
Symmetric = Annotated[
    bool | None, typer.Option("--symmetric/--asymmetric", help="Without or with zero points.", rich_help_panel=_WHAT)
]
Sparsity = Annotated[
    float | None, typer.Option(help="Share of the weights to drop: 0.5.", metavar="SHARE", rich_help_panel=_WHAT)
]
Pattern = Annotated[
    str | None,
    typer.Option(help="Keep N weights of each M adjacent inputs, e.g. 2:4.", metavar="N:M", rich_help_panel=_WHAT),
]
Ratios = Annotated[
    str | None,
    typer.Option(
        help="Find each layer's own sparsity: owl (by outliers), global (one magnitude for all).",
        metavar="owl|global",
        rich_help_panel=_WHAT,
    ),
]
Targets = Annotated[
    str | None,
    typer.Option(
        help="What is compressed, with commas between: linears (the default), embedding, head.",
        metavar="linears,embedding,head",
        rich_help_panel=_WHAT,
    ),
]
KeptBits = Annotated[
    int | None,
    typer.Option("--bits", help="Round what is kept too: 2, 3, 4 or 8 bits (sparsegpt).", rich_help_panel=_WHAT),
]
Neurons = Annotated[
    str | None, typer.Option(help="Inner channels of each MLP to keep.", metavar="N|75%", rich_help_panel=_PARTS)
]
Heads = Annotated[
    str | None, typer.Option(help="Attention heads of each layer to keep.", metavar="N|75%", rich_help_panel=_PARTS)
]
HiddenWidth = Annotated[
    str | None,
    typer.Option("--hidden", help="Channels between layers to keep.", metavar="N|75%", rich_help_panel=_PARTS),
]
Experts = Annotated[
    str | None, typer.Option(help="Experts of each layer to keep.", metavar="N|75%", rich_help_panel=_PARTS)
]
Layers = Annotated[
    str | None,
    typer.Option(help="Layers to keep: how many, or which.", metavar="N|75%|0,1,4", rich_help_panel=_PARTS),
]
TargetParams = Annotated[
    str | None,
    typer.Option(help="Find what to cut for so many parameters.", metavar="N|80%", rich_help_panel=_PARTS),
]
Qat = Annotated[
    bool | None,
    typer.Option("--qat", help="Round to --bits, and train through the rounding.", rich_help_panel=_WHAT),
]
Teacher = Annotated[
    str | None,
    typer.Option(help="Who teaches: Hub id or folder; without it MODEL, before it is cut.", rich_help_panel=_WHAT),
]
Loss = Annotated[
    str | None,
    typer.Option(help="What is made small.", metavar="kl|reverse-kl|jsd|uld", rich_help_panel=_LEARN),
]
Temperature = Annotated[
    float | None, typer.Option(help="Softens what teacher and student say: 2.", metavar="T", rich_help_panel=_LEARN)
]
Alpha = Annotated[
    float | None,
    typer.Option(help="Weight of the teacher; the rest is the text's.", metavar="0..1", rich_help_panel=_LEARN),
]
Cache = Annotated[
    str | None,
    typer.Option(
        help="Write down what the teacher says once, some tokens of each position, and learn without it.",
        metavar="sampled|topk",
        rich_help_panel=_LEARN,
    ),
]
CacheFolder = Annotated[
    str | None,
    typer.Option(
        help="Where that lies, for other students too: made once, then read.", metavar="DIR", rich_help_panel=_LEARN
    ),
]
CacheOnly = Annotated[
    bool,
    typer.Option("--cache-only", help="Do no more than that: students may learn elsewhere.", rich_help_panel=_LEARN),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Text, prompts or chats to learn from: auto, generator, self, a file, a Hub dataset.",
        rich_help_panel=_LEARN,
    ),
]
Batch = Annotated[int | None, typer.Option(help="Rows in a forward pass.", rich_help_panel=_LEARN)]
Rate = Annotated[float | None, typer.Option(help="Of learning, at its highest.", rich_help_panel=_LEARN)]
MaxSteps = Annotated[int | None, typer.Option(help="Steps of gradient at most.", rich_help_panel=_LEARN)]
MaxTokens = Annotated[int | None, typer.Option(help="Tokens to learn from at most.", rich_help_panel=_LEARN)]
MaxMinutes = Annotated[float | None, typer.Option(help="Minutes to learn at most.", rich_help_panel=_LEARN)]
ReportTo = Annotated[
    list[str] | None,
    typer.Option(
        help="Tell a tracker of losses: tensorboard, wandb, ...; repeatable.", metavar="NAME", rich_help_panel=_LEARN
    ),
]
AdapterKind = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="What learns: lora, rslora, dora, qlora, loftq, adalora, vera, ia3, prefix, prompt, p-tuning, adapter; "
        "full, freeze change the model itself.",
        metavar="NAME",
        autocompletion=complete_adapter,
        rich_help_panel=_WHAT,
    ),
]
AdapterRank = Annotated[int | None, typer.Option("--rank", help="Of the products: 16.", rich_help_panel=_WHAT)]
AdapterTarget = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="Linears beside which it stands, with commas between; all without it.",
        metavar="q_proj,v_proj",
        rich_help_panel=_WHAT,
    ),
]
Label = Annotated[
    str | None,
    typer.Option(help="Learn classes: the column of each row's.", metavar="COLUMN", rich_help_panel=_LEARN),
]
Merge = Annotated[
    bool | None, typer.Option("--merge", help="Write a whole model with it in the weights.", rich_help_panel=_WHAT)
]
Inputs = Annotated[
    str | None,
    typer.Option(help="Round inputs to 8 bits too: int8 or fp8.", metavar="int8|fp8", rich_help_panel=_WHAT),
]
Transform = Annotated[
    list[str] | None,
    typer.Option(
        help="Rewrite weights first, the function stays; repeatable.",
        autocompletion=complete_transform,
        rich_help_panel=_WHAT,
    ),
]
Format = Annotated[
    str | None, typer.Option(help="The checkpoint format.", autocompletion=complete_format, rich_help_panel=_WHAT)
]
Pack = Annotated[
    bool | None,
    typer.Option("--pack", help="Entropy-code the codes: a smaller file, as large in memory.", rich_help_panel=_WHAT),
]
Type = Annotated[
    str | None,
    typer.Option(
        "--type", help="A mix of GGUF types, e.g. Q4_K_M.", autocompletion=complete_type, rich_help_panel=_WHAT
    ),
]
TargetSize = Annotated[
    str | None,
    typer.Option(
        help="Choose each layer's bits by measuring, to meet a size: 3.5GiB, or 30% of the original.",
        metavar="SIZE",
        rich_help_panel=_WHAT,
    ),
]
TargetBpw = Annotated[
    float | None,
    typer.Option(help="The same, in bits per weight, all tensors counted.", metavar="3.2", rich_help_panel=_WHAT),
]
To = Annotated[
    str | None,
    typer.Option(help="The format to write.", autocompletion=complete_format, rich_help_panel=_WHAT),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.", rich_help_panel=_WHAT)]
Output = Annotated[str | None, typer.Option("--output", "-o", help="Folder of the result.", rich_help_panel=_WHAT)]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Any recipe key, e.g. method.damp=0.1; repeatable.", rich_help_panel=_WHAT
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(help="Text to calibrate on: auto, generator, self, a file, a Hub dataset.", rich_help_panel=_TEXT),
]
Samples = Annotated[int | None, typer.Option(help="Rows of calibration text.", rich_help_panel=_TEXT)]
Length = Annotated[int | None, typer.Option(help="Tokens in a row of calibration text.", rich_help_panel=_TEXT)]
Seed = Annotated[int | None, typer.Option(help="Which calibration rows are drawn.", rich_help_panel=_TEXT)]
Evaluation = Annotated[
    list[str] | None, typer.Option(help="Text to measure on, as --calibration; repeatable.", rich_help_panel=_TEXT)
]
Rows = Annotated[int | None, typer.Option(help="Rows of each text.", rich_help_panel=_TEXT)]
Baseline = Annotated[
    str | None, typer.Option(help="A model to compare with: KL to it.", metavar="MODEL", rich_help_panel=_TEXT)
]
RowLength = Annotated[int | None, typer.Option("--length", help="Tokens in a row.", rich_help_panel=_TEXT)]
MaxPplIncrease = Annotated[
    str | None, typer.Option(help="How much perplexity may grow.", metavar="3%", rich_help_panel=_GATES)
]
MaxKl = Annotated[
    float | None,
    typer.Option(help="Largest KL to the original, nats per token.", metavar="0.02", rich_help_panel=_GATES),
]
MinTop1 = Annotated[
    str | None, typer.Option(help="Share of tokens with the same first choice.", metavar="97%", rich_help_panel=_GATES)
]
MaxSize = Annotated[
    str | None,
    typer.Option(
        help="Size of the weights' files: 3.5GiB, or 30% of the original.", metavar="SIZE", rich_help_panel=_GATES
    ),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=_HOW)]
Threads = Annotated[int | None, typer.Option(help="CPU threads.", rich_help_panel=_HOW)]
Memory = Annotated[
    str | None,
    typer.Option(help="What the run may hold in memory, e.g. 6GiB.", metavar="SIZE", rich_help_panel=_HOW),
]
Sequential = Annotated[
    str | None,
    typer.Option(help="Layers see compressed inputs after each block, or subset.", rich_help_panel=_HOW),
]
Strict = Annotated[bool | None, typer.Option("--strict", help="Exit 9 if anything was degraded.", rich_help_panel=_HOW)]
Resume = Annotated[
    bool | None,
    typer.Option("--resume/--no-resume", help="Go on with an interrupted run (the default).", rich_help_panel=_HOW),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing result.", rich_help_panel=_HOW)]
Plan = Annotated[bool, typer.Option("--plan", help="Only show what would be done.", rich_help_panel=_HOW)]
Smoke = Annotated[
    bool, typer.Option("--smoke", help="Try one block from end to end, in seconds.", rich_help_panel=_HOW)
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.", rich_help_panel=_SHOW)]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Nothing on stderr but errors; a result is its path.", rich_help_panel=_SHOW),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Every note of the run; tracebacks.", rich_help_panel=_SHOW)
]


def _with_preset(data: dict[str, Any], preset: str, task: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's data with what an effort means for the stage of this task.

    Raises:
        UsageError: there is no such preset, or the method that was typed is not its own.
    """
    from llmshrink.errors import UsageError
    from llmshrink.recipe import load

    if preset not in PRESETS:
        raise UsageError(f"there is no preset {preset!r}", hint=f"choose {', '.join(PRESETS)}")
    whole = any(stage.get("cut") for stage in data["stages"])
    whole = whole or any(values.get(flag) is not None for flag, key in RECIPE_KEYS.items() if key.startswith("cut."))
    wanted = PRESETS[preset]["cut" if task == "prune" and whole else task]
    own = wanted.get("method.name")
    if own is not None and values.get("method") not in (None, own):
        raise UsageError(
            f"--preset fast is method {own}, which looks at no text", hint="leave out --preset or --method"
        )
    told = {key for stage in data["stages"] for key in ("reconstruct", "tune") if stage.get(key)}
    for key, value in wanted.items():
        if value is None or key not in told:  # a recipe that learns already knows how long
            data = load.override(data, key, value, task=task)
    return data


def _plain(flag: str, value: Any) -> Any:
    """A flag's value as a recipe has it."""
    if flag == "layers" and "," in value and all(part.strip().isdecimal() for part in value.split(",")):
        return [int(part) for part in value.split(",")]
    if flag in ("targets", "linears"):
        return [part.strip() for part in value.split(",")]
    return list(value) if isinstance(value, tuple) else value


def _place(key: str, task: str) -> str:
    """Where a key stands in a stage of this task: who learns is cut out of the model, and perhaps rounded."""
    if task != "distill":
        return key
    return f"qat.{key}" if key.startswith(("method.", "format.")) else key.replace("cut.", "student.")


def _places(key: str, task: str, data: Mapping[str, Any]) -> list[str]:
    """Where a key stands in a recipe: of several stages, in each that trains."""
    if task != "run" or not key.startswith("train."):
        return [_place(key, task)]
    trains = [n for n, stage in enumerate(data["stages"]) if stage.get("task") in ("distill", "lora")]
    return [f"stages.{n}.{key}" for n in trains]


def _with_qat(data: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's data with training through rounding, where it is asked for.

    Raises:
        UsageError: nothing is to be rounded, and a flag says how.
    """
    from llmshrink.errors import UsageError
    from llmshrink.recipe import load

    if any(stage.get("qat") is not None for stage in data["stages"]):
        return data
    if values.get("qat"):
        return load.override(data, "qat", {}, task="distill")
    how = [
        flag for flag, key in RECIPE_KEYS.items() if values.get(flag) is not None and "qat." in _place(key, "distill")
    ]
    if how:
        raise UsageError(
            f"--{how[0].replace('_', '-')} says how a student is rounded, which training does with --qat alone",
            hint="add --qat, or quantize the result in a second run",
        )
    return data


def _refuse_calibration(recipe: Recipe, values: Mapping[str, Any]) -> None:
    """Raise UsageError for a flag of calibration where an adapter is learned: it would do nothing."""
    from llmshrink.errors import UsageError
    from llmshrink.recipe.lora import LoraStage

    told = [flag for flag in CALIBRATING if values.get(flag) is not None]
    if told and any(isinstance(stage, LoraStage) and not stage.writes_model for stage in recipe.stages):
        raise UsageError(
            f"--{told[0]} is about calibration, and nothing is calibrated where an adapter learns",
            hint="--data names the text to learn from; its rows are set by train.length, train.seed (--set)",
        )


def build_recipe(task: str, values: Mapping[str, Any]) -> Recipe:
    """The recipe of a command: the named recipe, under the flags, under `--set`.

    Args:
        task: a stage that the recipe must have; without `--recipe` it is the only one; run: any, or several.
        values: the command's parameters by name; None means not given.

    Raises:
        UsageError: the recipe is for another command.
        RecipeError: the recipe does not validate.
    """
    from llmshrink.errors import UsageError
    from llmshrink.recipe import load

    name = values.get("recipe")
    data: dict[str, Any] = load.read(name) if name else {"version": 1, "stages": [{"task": task}]}
    if task == "export" and not name:  # the same codes: nothing to measure unless it is asked for
        asked = any(values.get(flag) is not None for flag in QUALITY_GATES)
        data["evaluation"] = {"data": ["auto"] if asked else [], "speed": False}
    if values.get("preset") is not None:
        data = _with_preset(data, values["preset"], task, values)
    for flag, other in (("target_size", "bpw"), ("target_bpw", "size")):  # of a recipe that asks otherwise
        if values.get(flag) is not None:
            data = load.override(data, f"allocate.{other}", None, task=task)
    if task == "distill":
        data = _with_qat(data, values)
    for flag, key in RECIPE_KEYS.items():
        value = values.get(flag)
        if value in (None, (), []):
            continue
        for place in _places(key, task, data):
            data = load.override(data, place, _plain(flag, value), task=task)
    recipe = load.validate(load.apply_overrides(data, values.get("set") or []), origin=name or "recipe")
    _refuse_calibration(recipe, values)
    tasks = [stage.task for stage in recipe.stages]
    writing = [name for name in tasks if name in WRITING]
    command = "run" if len(writing) > 1 else next(iter(writing), "eval")
    if task not in (command, "run"):
        raise UsageError(f"{name or 'the recipe'} is for llmshrink {command}", hint=f"its stages: {', '.join(tasks)}")
    return recipe
