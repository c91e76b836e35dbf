"""What is cut out of a model, family by family: what is left loads in transformers and does what it did, masked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import load, logits
from safetensors.torch import save_file
from tiny import FAMILIES, build_model, config
from torch import Tensor
from transformers import PreTrainedModel

from llmshrink.errors import PlanError
from llmshrink.io.files import copy_file
from llmshrink.model.anatomy import block_list
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.model.surgery import Cut, stretches
from llmshrink.model.widths import Chosen, Width, operate, width_of

# What the configurations of transformers 5.23 cannot say, and a word of the reason.
IMPOSSIBLE = {
    "neurons": {"mixtral": "experts", "bloom": "no key", "modernbert": "how they lie"},
    "heads": {
        "olmo2": "norm over all",
        **dict.fromkeys(("gpt2", "opt", "opt-projected", "gpt-neox", "bloom", "bert", "bert-masked"), "follows"),
        **dict.fromkeys(("bert-classes", "roberta", "xlm-roberta-tokens", "distilbert", "electra"), "follows"),
        **dict.fromkeys(("falcon", "falcon-new", "falcon-alibi"), "no setter"),
        "mpnet": "norm over all",
        "modernbert": "follows",
    },
}
EVERY = list(FAMILIES)


def opened(folder: Path) -> StreamedModel:
    return StreamedModel(open_source(str(folder)), torch.device("cpu"))


def written(small: StreamedModel, folder: Path) -> PreTrainedModel:
    """What is left, in a folder of its own, as transformers loads it."""
    folder.mkdir()
    tensors = {key: small.weights.dense(key).contiguous().clone() for key in small.weights.infos}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(small.source.config_dict))
    for name, path in small.source.companions.items():
        copy_file(path, folder / name)
    model, info = load(folder)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model


def kept(total: int, count: int, seed: int) -> Tensor:
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def chosen(model: StreamedModel, width: Width, count: int) -> Chosen:
    """Other things in every block."""
    blocks = range(len(model.anatomy.blocks))
    return Chosen(tuple(blocks), {width.name: tuple(kept(width.total, count, block) for block in blocks)})


def masked(folder: Path, width: Width, things: Chosen) -> PreTrainedModel:
    """The whole model in which whatever reads the things that are gone reads zeros."""
    model = load(folder)[0]
    streamed = opened(folder)
    state: dict[str, Any] = dict(model.named_parameters())
    homes = {key: block.index for block in streamed.anatomy.blocks for key in block.keys}
    for (key, axis), units in width.axes.items():
        matrix = next((m for m in streamed.anatomy.matrices if m.key == key), None)
        if matrix is None or axis != (0 if matrix.transposed else 1):
            continue  # not a reader
        index = stretches(units, width.total, things.inside[width.name][homes[key]])
        with torch.no_grad():
            weight = state[matrix.parameter].movedim(axis, 0)
            left = torch.zeros(len(weight), dtype=torch.bool).index_fill_(0, index, True)
            weight[~left] = 0
    return model


@pytest.mark.parametrize("name", ["neurons", "heads"])
@pytest.mark.parametrize("family", EVERY)
def test_what_is_left_does_what_the_masked_model_does(
    models_folder: Callable[..., Path], tmp_path: Path, family: str, name: str
) -> None:
    folder = models_folder(family)
    model = opened(folder)
    if why := IMPOSSIBLE[name].get(family):
        with pytest.raises(PlanError, match=why) as caught:
            width_of(model, name)
        assert "layers can be" in (caught.value.hint or "")
        return
    width = width_of(model, name)
    count = width.total - 1 if name == "heads" else width.total * 3 // 4
    things = chosen(model, width, count)
    small = StreamedModel(Cut.of(model.source, operate(model, [width], things)), model.device)
    assert small.parameters < model.parameters
    found, right = logits(written(small, tmp_path / "cut")), logits(masked(folder, width, things))
    assert float((found - right).abs().max()) <= 1e-4 * float(right.std())
    assert float((right - logits(load(folder)[0])).abs().max()) > 1e-2  # something was cut


@pytest.mark.parametrize(("family", "blocks"), [("mixtral", 2), ("qwen3-moe", 1)])
def test_experts_go_with_their_rows_of_the_router(
    models_folder: Callable[..., Path], tmp_path: Path, family: str, blocks: int
) -> None:
    model = opened(models_folder(family))
    width = width_of(model, "experts")
    assert (width.total, width.possible) == (4, (2, 3, 4))
    left = (torch.tensor([0, 1, 3]), torch.tensor([1, 2, 3]))
    small = StreamedModel(
        Cut.of(model.source, operate(model, [width], Chosen((0, 1), {"experts": left}))), model.device
    )
    found, whole = written(small, tmp_path / "cut"), load(models_folder(family))[0]
    assert logits(found).isfinite().all()
    seen = 0
    for name, value in found.named_parameters():
        before, index = whole.get_parameter(name), left[int(name.split(".")[2])] if "layers" in name else None
        if value.shape != before.shape:
            assert index is not None and torch.equal(value, before[index]), name
            seen += 1
        else:
            assert torch.equal(value, before)
    assert seen == 3 * blocks  # the router, two fused matrices


def test_experts_that_cannot_be_cut(models_folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="it has none"):
        width_of(opened(models_folder("llama")), "experts")
    build_model(tmp_path / "all", config("mixtral", num_experts_per_tok=4))
    with pytest.raises(PlanError, match="each token has all 4"):
        width_of(opened(tmp_path / "all"), "experts")


@pytest.mark.parametrize("family", [name for name in EVERY if name not in ("qwen3-moe", "modernbert")])
def test_layers_are_taken_out_of_every_family(models_folder: Callable[..., Path], tmp_path: Path, family: str) -> None:
    folder = models_folder(family)
    model = opened(folder)
    surgery = operate(model, [], Chosen((1,), {}))
    small = StreamedModel(Cut.of(model.source, surgery), model.device)
    found = logits(written(small, tmp_path / "cut"))
    whole = load(folder)[0]
    if family.startswith("gemma3"):
        assert small.source.config.layer_types == ["full_attention"]
    blocks = block_list(whole)[1]
    del blocks[0]  # surgery in memory
    for module in blocks.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = 0
    whole.config.num_hidden_layers = 1
    if getattr(whole.config, "layer_types", None):
        whole.config.layer_types = whole.config.layer_types[1:]
    right = logits(whole)
    assert float((found - right).abs().max()) <= 1e-4 * float(right.std())


def test_layers_that_the_family_ties_to_their_numbers_are_told(models_folder: Callable[..., Path]) -> None:
    model = opened(models_folder("qwen3-moe"))
    surgery = operate(model, [], Chosen((1,), {}))
    assert surgery.config["mlp_only_layers"] == [0]
    small = StreamedModel(Cut.of(model.source, surgery), model.device)
    assert all(m.kind != "experts" for m in small.anatomy.matrices)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "qwen3", "gemma2", "phi3", "olmo2"])
def test_channels_between_blocks_are_cut_everywhere(
    models_folder: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    model = opened(models_folder(family))
    width = width_of(model, "hidden")
    index = kept(width.total, 48, 0)
    surgery = operate(model, [width], Chosen(tuple(range(len(model.anatomy.blocks))), {}, index))
    small = StreamedModel(Cut.of(model.source, surgery), model.device)
    assert small.hidden == 48
    assert logits(written(small, tmp_path / "cut")).isfinite().all()
    table, own = (m.weights.get(m.anatomy.embedding.key) for m in (model, small) if m.anatomy.embedding)
    assert torch.equal(own, table[:, index])
    rows = small.weights.rows(small.anatomy.embedding.key) if small.anatomy.embedding else None
    assert rows is not None and torch.equal(rows(torch.tensor([5, 3])), table[[5, 3]][:, index])


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt-neox", "bloom", "falcon", "bert", "mixtral", "opt-projected"])
def test_channels_that_heads_follow_from_cannot_be_cut(models_folder: Callable[..., Path], family: str) -> None:
    with pytest.raises(PlanError, match="hidden cannot be cut"):
        width_of(opened(models_folder(family)), "hidden")


def test_all_that_a_configuration_says_of_layers_is_cut_with_them(tmp_path: Path) -> None:
    settings = {"num_hidden_layers": 6, "max_window_layers": 4, "use_sliding_window": True, "sliding_window": 8}
    build_model(tmp_path / "model", config("qwen2", **settings))
    model = opened(tmp_path / "model")
    kinds = model.source.config.layer_types
    surgery = operate(model, [], Chosen((0, 2, 4, 5), {}))
    assert surgery.config["num_hidden_layers"] == 4
    assert surgery.config["layer_types"] == [kinds[i] for i in (0, 2, 4, 5)]
    assert surgery.config["max_window_layers"] == 2
    names = {key for key in surgery.tensors if key.startswith("model.layers.3.")}
    assert {surgery.tensors[name].key for name in names} == {name.replace(".3.", ".5.", 1) for name in names}


def test_fused_stretches_are_cut_in_each() -> None:
    assert stretches((2, 1, 1), 3, torch.tensor([0, 2])).tolist() == [0, 1, 4, 5, 6, 8, 9, 11]
