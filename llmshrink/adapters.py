"""Several adapters of one model: what each is, how they compare, and one that is made of several."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from llmshrink.adapting import masked
from llmshrink.bottleneck import is_bottleneck
from llmshrink.calibration.load import TextLoader
from llmshrink.checks.adapter import check_adapter
from llmshrink.checks.base import check_base
from llmshrink.checks.written import probe_tokens
from llmshrink.engine.workspace import Workspace
from llmshrink.errors import GateError, InputError, PlanError
from llmshrink.evaluate.metrics import Scores
from llmshrink.forms import Event
from llmshrink.io.files import copy_file, disk_faults, parse_json
from llmshrink.io.safetensors import Checkpoint, read_header
from llmshrink.machine import quiet_libraries
from llmshrink.model.source import Source, open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.layout import row_length
from llmshrink.progress import Progress
from llmshrink.recipe.schema import EvaluationSpec
from llmshrink.report.schema import Check, Report
from llmshrink.train.adaptation import ADAPTER, BASE, SETTINGS, given_out, save_adapter
from llmshrink.train.base import load_base
from llmshrink.train.merging import merge, pruned, save_whole

COMBINATIONS = ("cat", "svd", "linear", "ties", "dare_ties", "dare_linear", "magnitude_prune")
SPARSE = ("ties", "dare_ties", "dare_linear", "magnitude_prune")  # which keep a share of the numbers of each
DENSITY = 0.5
CPU = torch.device("cpu")


@dataclass(frozen=True)
class AdapterInfo:
    """What a folder says of its adapter."""

    folder: str
    kind: str
    rank: int | None
    task: str | None  # what it is for, in peft's words
    base: str | None  # its model, as it says itself
    own: str | None  # the folder of that, where it brings its own
    bytes: int
    tokens: int | None  # that it learned from; None: it does not say
    held_before: float | None
    held_after: float | None


def look(folder: Path) -> AdapterInfo:
    """What one adapter is.

    Raises:
        InputError: the folder holds none.
    """
    said, report = _read(folder)
    kind = str(said.get("adapter_type") or said.get("peft_type", "?")).lower().replace("_", "-")
    if kind == "lora":
        kind = "dora" if said.get("use_dora") else "rslora" if said.get("use_rslora") else kind
    stages = [] if report is None else report.stages
    trained = next((stage.trained for stage in stages if stage.trained), None)
    return AdapterInfo(
        folder=str(folder),
        kind=kind,
        rank=said.get("r"),
        task=said.get("task_type"),
        base=said.get("base_model_name_or_path"),
        own=str(folder / BASE) if (folder / BASE).is_dir() else None,
        bytes=Checkpoint(folder, read_header(folder / ADAPTER)).bytes,
        tokens=None if trained is None else trained.tokens,
        held_before=None if trained is None else trained.held_before,
        held_after=None if trained is None else trained.held_after,
    )


def _read(folder: Path) -> tuple[dict[str, Any], Report | None]:
    """The settings of an adapter, and the report of the run that made it."""
    path = folder / SETTINGS
    if not path.is_file() or not (folder / ADAPTER).is_file():
        raise InputError(f"{folder} holds no adapter: {SETTINGS} and {ADAPTER} belong into it.")
    try:
        said: dict[str, Any] = parse_json(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    report = folder / "report.json"
    return said, Report.model_validate_json(report.read_bytes()) if report.is_file() else None


def _check_bases(folders: list[Path], source: Source) -> None:
    for folder in folders:
        check_base(folder, *_read(folder), folder / BASE, source)


def attach(base: PreTrainedModel, folders: list[Path]) -> PeftModel:
    """A model with all of these adapters, called 0, 1, ..., of which the first is in use; `set_adapter` switches.

    Raises:
        InputError: one is no adapter of peft's, or does not fit the model.
    """
    for folder in folders:
        if is_bottleneck(folder):
            raise InputError(f"{folder} is an adapter of llmshrink's own: only those of peft can be held together.")
    try:
        model = PeftModel.from_pretrained(base, str(folders[0]), adapter_name="0")
        for number, folder in enumerate(folders[1:], 1):
            model.load_adapter(str(folder), adapter_name=str(number))
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"An adapter does not fit {type(base).__name__}: {error}") from error
    return model.eval()


def compare(model_id: str, folders: list[Path], spec: EvaluationSpec, *, progress: Progress) -> list[dict[str, Any]]:
    """Perplexity of a model on each text, alone and with each of its adapters, which are switched in one copy of it.

    Returns:
        For each text: its name, and the perplexity by the adapter's folder; that of the model alone is under "".
    """
    with quiet_libraries():
        source = open_source(model_id)
        _check_bases(folders, source)
        streamed = StreamedModel(source, CPU)
        loader = TextLoader(streamed, embedded=False, progress=progress)
        texts = loader.evaluation(spec, row_length(spec.length, streamed, []), None)
        model = attach(load_base(source, CPU), folders)
        found = []
        progress.start("compare", sum(text.count for text in texts) * (len(folders) + 1))
        for text in texts:
            line: dict[str, Any] = {"text": text.origin}
            for number, name in enumerate(["", *map(str, folders)], -1):
                scores = Scores()
                if number >= 0:
                    model.set_adapter(str(number))
                for row in text.tokens:
                    scores.update(_logits(model, row[None], alone=number < 0), row[None])
                    progress.advance(len(row))
                line[name] = scores.perplexity
            found.append(line)
        progress.finish()
    return found


@torch.no_grad()
def _logits(model: PeftModel, tokens: torch.Tensor, *, alone: bool) -> torch.Tensor:
    if alone:
        with model.disable_adapter():
            found: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    else:
        found = model(input_ids=tokens, use_cache=False).logits
    return found[:, -tokens.shape[1] :].float()


def combine(
    model_id: str,
    parts: list[tuple[Path, float]],
    output: Path,
    *,
    how: str = "cat",
    into: bool = False,
    overwrite: bool = False,
) -> tuple[list[Check], list[Event]]:
    """Make one adapter of several, or put them into the weights of their model.

    Args:
        model_id: their model.
        parts: folders, each with its weight.
        output: the folder to write.
        how: cat is the exact sum, of as many ranks as all have; svd its nearest of the largest rank; others as in peft.
        into: write the whole model with the sum in its weights.
        overwrite: replace an output that llmshrink made.

    Returns:
        How it was verified, and what should be known of it.

    Raises:
        PlanError: they are no products of two matrices, or `how` is none that is known.
        GateError: what was written is not what was in memory.
    """
    if how not in COMBINATIONS:
        raise PlanError(f"There is no way {how!r} to combine adapters; there are: {', '.join(COMBINATIONS)}.")
    if odd := [str(folder) for folder, _ in parts if look(folder).kind not in ("lora", "rslora")]:
        raise PlanError(f"Only adapters of lora and rslora have a sum that is one: {odd[0]} is none.")
    with quiet_libraries(), disk_faults(output, 0), Workspace(output, overwrite=overwrite) as workspace:
        source = open_source(model_id)
        _check_bases([folder for folder, _ in parts], source)
        streamed = StreamedModel(source, CPU)
        if streamed.weights.format.name != "dense":
            raise PlanError(f"{model_id} is quantized: merge into the model of floats, and quantize the result.")
        tokens = probe_tokens(streamed)
        workspace.begin({"adapters": [str(folder) for folder, _ in parts]}, resume=False)
        model = attach(load_base(source, CPU), [folder for folder, _ in parts])
        names, weights = [str(n) for n in range(len(parts))], [weight for _, weight in parts]
        density = {"density": DENSITY} if how in SPARSE else {}
        model.add_weighted_adapter(names, weights, "default", combination_type=how, **density)
        model.set_adapter("default")
        for name in names:
            model.delete_adapter(name)
        meant, events = given_out(model, tokens), list[Event]()
        if into:
            whole, found = merge(model, source.config.dtype or torch.float32, tokens, meant, pruned(streamed, "auto"))
            save_whole(whole, workspace.folder, source)
            events = masked(found)
            detail = f"max |difference| of logits {found.merged:.2e}, as it is stored {found.rounded:.2e}"
            checks = [Check(name="merged", passed=found.merged <= 1e-4 * max(1.0, found.spread), detail=detail)]
        else:
            save_adapter(model, workspace.folder, source)
            for name, path in source.companions.items():
                if "/" not in name:
                    copy_file(path, workspace.folder / name)
            room = 4 * streamed.parameters
            checks = [check_adapter(source.folder, workspace.folder, tokens, meant, room=room)]
        if failed := [check for check in checks if check.passed is False]:
            raise GateError(f"What was written does not verify; it stays in {workspace.folder}: {failed[0].detail}")
        workspace.commit()
    return checks, events


def as_data(infos: list[AdapterInfo]) -> list[dict[str, Any]]:
    """For JSON."""
    return json.loads(json.dumps([asdict(info) for info in infos]))  # type: ignore[no-any-return]


__all__ = ["AdapterInfo", "COMBINATIONS", "as_data", "combine", "compare", "look"]
