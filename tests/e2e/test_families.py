"""Every family through every method and format that its loader can read, as the table of runtimes says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import decoded_model, load, logits, recipe
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, config
from transformers import PreTrainedModel

from llmshrink import run
from llmshrink.errors import PlanError
from llmshrink.evaluate.foreign import compute_in_float32, keep_inputs
from llmshrink.formats.runtimes import FAMILIES as TABLE
from llmshrink.formats.runtimes import Family, Stored, entry
from llmshrink.forms import Scheme
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.progress import Silent

ROUNDING = 1e-5  # of logits, as a share of their spread: sums in another order
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("gptq4", {"name": "gptq", "bits": 4, "group_size": 32}),
    ("gptq3", {"name": "gptq", "bits": 3, "group_size": 32}),
    ("rtn2", {"name": "rtn", "bits": 2, "group_size": 32}),
    ("rtn8", {"name": "rtn", "bits": 8, "group_size": -1}),
    ("rtn4-asymmetric", {"name": "rtn", "bits": 4, "group_size": 32, "symmetric": False}),
    ("nf4", {"name": "nf4", "block_size": 32}),
    ("nf4-double", {"name": "nf4", "block_size": 32, "double_quant": True}),
    ("fp4", {"name": "fp4", "block_size": 32}),
    ("int8", {"name": "int8"}),
    ("hqq3", {"name": "hqq", "bits": 3, "group_size": 32, "symmetric": False}),
    ("ternary", {"name": "ternary", "group_size": 32}),
    ("binary", {"name": "binary", "group_size": -1}),
]
BNB = ("nf4", "fp4", "int8")
USUAL = {("gptq4", "compressed-tensors"), ("nf4", "bnb")}  # the default tier of every family
PLAIN = {("rtn4-asymmetric", "compressed-tensors")}  # of these
PLAINEST = ("llama", "gemma2", "qwen2", "opt", "bert")


def family_of(name: str) -> Family:
    model_type = config(name).model_type
    return next(family for family in TABLE if model_type in family.model_types)


def stored(name: str, method: dict[str, Any], fmt: str) -> Stored:
    bits, size = method.get("bits", 4), method.get("group_size", 32)
    scheme = Scheme(bits, method.get("symmetric", True), None if size == -1 else size)
    family, schemes = family_of(name), frozenset() if method["name"] in BNB else frozenset([scheme])
    return Stored(fmt, frozenset(family.kinds), schemes, causal=family.causal)


def cases() -> list[Any]:
    """family, method, format, whether transformers reads it; the unusual ones are slow."""
    found = []
    for family in FAMILIES:
        for label, method in METHODS:
            for fmt in ("compressed-tensors", "bnb", "dense"):
                if fmt != "dense" and (fmt == "bnb") != (method["name"] in BNB):
                    continue  # the format cannot hold it, whatever the family
                if (label, fmt) == ("int8", "dense"):
                    continue  # nor that inputs are rounded
                reads = entry(stored(family, method, fmt), "transformers").support != "no"
                usual = USUAL | PLAIN if family in PLAINEST else USUAL
                marks = [] if (label, fmt) in usual or not reads else [pytest.mark.slow]
                found.append(pytest.param(family, method, fmt, reads, marks=marks, id=f"{family}-{label}-{fmt}"))
    return found


@pytest.mark.parametrize(("family", "method", "fmt", "reads"), cases())
def test_matrix(
    models_folder: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    family: str,
    method: dict[str, Any],
    fmt: str,
    reads: bool,
) -> None:
    dtype = torch.bfloat16 if fmt == "compressed-tensors" else torch.float32
    source, out = models_folder(family, dtype), tmp_path / "out"
    wanted = recipe(source, out, text_file, method, stage={"format": {"name": fmt}})
    if not reads:
        with pytest.raises(PlanError, match="transformers would not load it"):
            run.execute(wanted, progress=Silent())
        return
    report = run.execute(wanted, progress=Silent())
    stage = report.stages[0]
    assert {c.name for c in stage.checks} == {"sizes", "hashes", "decode", "copied", "blocks", "reader"}
    assert stage.planned_bytes_after == stage.bytes_after
    model, info = exact(out)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours, theirs = logits(decoded_model(out, source)), logits(model)
    assert ours.std() > 0.5, "without a spread any comparison passes"
    assert (ours - theirs).abs().max() <= ROUNDING * ours.std()
    # The negative control: one changed code must show.
    flip_a_code(out, fmt)
    assert (ours - logits(exact(out)[0])).abs().max() > 10 * ROUNDING * ours.std()


def exact(folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The folder as it is loaded, without what makes its sums faster and less exact."""
    model, info = load(folder)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    compute_in_float32(model)
    keep_inputs(model)
    return model, info


def flip_a_code(folder: Path, fmt: str) -> None:
    path = folder / "model-00001-of-00003.safetensors"
    tensors = load_file(path)
    name = next(
        n
        for n in sorted(tensors)
        if n.endswith("weight_packed")
        or (fmt == "bnb" and tensors[n].dtype in (torch.int8, torch.uint8) and n.endswith("weight"))
        or (fmt == "dense" and tensors[n].ndim == 2)
    )
    flat = tensors[name].view(-1)
    if fmt == "dense":
        flat[5] += 1.0
    else:
        flat[0] ^= 0b110
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_large_weight_of_a_block_is_covered(models_folder: Callable[..., Path], family: str) -> None:
    model = StreamedModel(open_source(str(models_folder(family))), torch.device("cpu"))
    infos = model.weights.infos
    for block in model.anatomy.blocks:
        large = {key for key in block.keys if len(infos[key].shape) >= 2}
        matrices, left = {m.key for m in block.matrices}, {key for key, _ in block.left}
        assert matrices | left == large and not matrices & left
        assert all(key.endswith(".gate.weight") for key in left), "routers alone are left"
    kinds = {m.kind for block in model.anatomy.blocks for m in block.matrices}
    assert kinds == set(family_of(family).kinds)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_recipe_suits_the_family(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path, family: str
) -> None:
    plan = run.make_plan(recipe(models_folder(family), tmp_path / "out", text_file))
    packed = family != "gpt2"
    expected = ("gptq", "compressed-tensors") if packed else ("nf4", "bnb")
    assert (plan.method, plan.format) == expected
    assert any(e.kind == "default_method" for e in plan.events) != packed
    blocks = sum(layer.parameters for block in plan.blocks for layer in block.layers)
    assert plan.parameters_compressed == blocks and json.dumps(plan.model_dump(mode="json"))
