"""A model run block by block gives the logits of the whole model, for each family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import load, logits
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, build_model, config
from transformers import AutoModelForCausalLM

from llmshrink.checks.written import streamed_output
from llmshrink.errors import InputError
from llmshrink.model.anatomy import block_list
from llmshrink.model.source import open_source
from llmshrink.model.streamed import Decoded, StreamedModel
from llmshrink.model.truncate import truncate

CPU = torch.device("cpu")
Models = Callable[..., Path]
IDS = torch.randint(0, 160, (3, 32), generator=torch.Generator().manual_seed(11))


def streamed(folder: Path) -> torch.Tensor:
    return streamed_output(StreamedModel(open_source(str(folder)), CPU), IDS)


def whole(folder: Path) -> torch.Tensor:
    return logits(load(folder)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_is_that_of_the_whole_model(models_folder: Models, family: str, dtype: torch.dtype) -> None:
    folder = models_folder(family, dtype)
    expected, found = whole(folder), streamed(folder)
    assert expected.std() > 0.5
    if family in ("qwen3-moe", "bert-classes"):  # experts, and heads for rows, are multiplied one by one here
        assert (found - expected).abs().max() <= 1e-5 * expected.std()
    else:
        assert torch.equal(found, expected)


def test_a_block_is_in_memory_only_while_it_is_loaded(models_folder: Models) -> None:
    model = StreamedModel(open_source(str(models_folder("llama"))), CPU)
    block = model.model.get_submodule("model.layers.1")
    assert all(p.is_meta for p in block.parameters())
    model.load_block(1)
    assert not any(p.is_meta for p in block.parameters())
    assert all(p.is_meta for p in model.model.get_submodule("model.layers.0").parameters())
    model.drop_block(1)
    assert all(p.is_meta for p in block.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_other_weights_take_the_place_of_the_stored_ones(models_folder: Models, tmp_path: Path, family: str) -> None:
    folder = models_folder(family)
    model = StreamedModel(open_source(str(folder)), CPU)
    changed = {m.key: (model.read(m) * 0.5).float() for m in model.anatomy.blocks[0].matrices}
    model.load_block(0, {key: Decoded(lambda weight=weight: weight) for key, weight in changed.items()})
    got = {n: p.detach().clone() for n, p in model.model.named_parameters() if not p.is_meta}
    model.load_block(0)
    for name in model.anatomy.blocks[0].parameters:
        plain = model.model.get_parameter(name)
        halved = any(key in changed for key in model.map.origins[name].keys)
        assert torch.equal(got[name], plain * 0.5 if halved else plain), name


def test_loaded_weights_are_copies(models_folder: Models) -> None:
    model = StreamedModel(open_source(str(models_folder("llama"))), CPU)
    model.load_block(0)
    model.model.get_submodule("model.layers.0.mlp.up_proj").weight.data.zero_()  # type: ignore[union-attr]
    assert model.weights.get("model.layers.0.mlp.up_proj.weight").abs().min() > 0


# --- checkpoints as they are found


@pytest.fixture(scope="module")
def bare_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 as the Hub has it: names without `transformer.`, and masks that old code stored."""
    folder = tmp_path_factory.mktemp("bare") / "gpt2"
    build_model(folder, config("gpt2"))
    path = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    for index in range(2):
        tensors[f"h.{index}.attn.bias"] = torch.ones(1, 1, 128, 128).tril()
        tensors[f"h.{index}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_names_without_their_prefix_are_read(bare_gpt2: Path) -> None:
    assert torch.equal(streamed(bare_gpt2), whole(bare_gpt2))
    anatomy = StreamedModel(open_source(str(bare_gpt2)), CPU).anatomy
    assert [m.name for m in anatomy.blocks[1].matrices] == [
        f"h.1.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert set(anatomy.unused) == {f"h.{i}.attn.{name}" for i in range(2) for name in ("bias", "masked_bias")}
    assert "wte.weight" in anatomy.others


def test_a_sharded_checkpoint_is_read(models_folder: Models, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(models_folder("llama"))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(streamed(tmp_path), whole(models_folder("llama")))


def test_missing_tensors_and_other_shapes_are_named(models_folder: Models, tmp_path: Path) -> None:
    build_model(tmp_path, config("llama"))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    cut = {**tensors, "model.layers.1.mlp.up_proj.weight": tensors["model.layers.1.mlp.up_proj.weight"][:3].clone()}
    save_file(cut, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"'model.layers.1.mlp.up_proj.weight' is \[3, 64\] on disk.*\[128, 64\]"):
        StreamedModel(open_source(str(tmp_path)), CPU)
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 parameters of LlamaForCausalLM .*model\.norm\.weight"):
        StreamedModel(open_source(str(tmp_path)), CPU)


# --- truncated


@pytest.mark.parametrize("family", [*FAMILIES, "bare gpt2"])
def test_a_truncated_model_is_the_model_cut_off(
    models_folder: Models, bare_gpt2: Path, tmp_path: Path, family: str
) -> None:
    folder = bare_gpt2 if family == "bare gpt2" else models_folder(family)
    truncate(StreamedModel(open_source(str(folder)), CPU), tmp_path)
    model, info = load(tmp_path)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    full = load(folder)[0]
    del block_list(full)[1][1]
    assert (logits(model) - logits(full)).abs().max() <= 1e-5
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
