"""Names and changes of tensors, compared with gguf-py's table and with what transformers does to undo them."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from gguf_files import CHANGES, FAMILIES, plan, shards
from tiny import build_model, config
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from llmshrink.errors import PlanError
from llmshrink.gguf.names import FAMILIES as TABLE
from llmshrink.gguf.names import Change, family_of, family_read


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_of_gguf_py(family: str, tmp_path: Path) -> None:
    build_model(tmp_path, config(family, **CHANGES.get(family, {})))
    found = family_of(config(family).model_type)
    architecture = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == found.architecture)
    theirs = gguf.get_tensor_name_map(architecture, 2)
    for key in shards(tmp_path):
        name = found.name(key)
        assert name == theirs.get_name(key.removeprefix("transformer."), try_suffixes=(".weight", ".bias"))
        assert name is not None and found.key(name) == key


def test_every_family_is_found_by_what_files_say() -> None:
    for family in TABLE.values():
        assert family_read(family.architecture) in (family, TABLE["llama"])
    assert family_read("whatever") is None


@pytest.mark.parametrize(
    "key", ["model.layers.0.self_attn.rotary.weight", "visual.weight", "model.layers.0.weight", ""]
)
def test_what_has_no_name_is_not_named(key: str) -> None:
    assert family_of("llama").name(key) is None


def test_other_models_are_refused_with_those_there_are() -> None:
    with pytest.raises(PlanError, match="gemma2, gemma3_text, gpt2, llama, mistral, phi3, qwen2, qwen3.*'mamba'"):
        family_of("mamba")


def test_only_the_biases_that_llama_cpp_reads_have_names() -> None:
    key = "model.layers.1.self_attn.o_proj.bias"
    assert family_of("llama").name(key) == "blk.1.attn_output.bias"
    assert family_of("qwen2").name(key) is family_of("qwen3").name(key) is None


@pytest.mark.parametrize("shape", [(32,), (32, 5), (32, 17)])
def test_rows_of_heads_are_interleaved_as_transformers_undoes_it(shape: tuple[int, ...]) -> None:
    tensor = torch.randint(256, shape, dtype=torch.uint8)
    change = Change(heads=4)
    moved = change.forward(tensor)
    assert not torch.equal(moved, tensor)
    theirs = LlamaTensorProcessor()._reverse_permute_weights(moved.numpy(), 4, 4)
    assert torch.equal(torch.from_numpy(theirs.copy()), tensor)
    assert torch.equal(change.back(moved), tensor)


def test_each_change_is_undone() -> None:
    tensor = torch.randn(16, 6)
    change = Change(transpose=True)
    assert torch.equal(change.back(change.forward(tensor)), tensor)
    norm = torch.tensor([0.0, 0.5, -1.0, 3.0])
    assert torch.equal(Change(add=1.0).forward(norm), norm + 1)
    assert torch.equal(Change(add=1.0).back(norm + 1), norm)


def test_only_keys_and_queries_of_llama_are_moved() -> None:
    llama, qwen = family_of("llama"), family_of("qwen2")
    assert llama.change("blk.0.attn_q.weight", (8, 2), packed=True) == Change(heads=8)
    assert llama.change("blk.0.attn_k.bias", (8, 2), packed=False) == Change(heads=2)
    assert llama.change("blk.0.attn_v.weight", (8, 2), packed=False) == Change()
    assert qwen.change("blk.0.attn_q.weight", (8, 2), packed=False) == Change()


def test_conv1d_is_turned_only_where_it_is_dense() -> None:
    gpt2 = family_of("gpt2")
    assert gpt2.change("blk.0.attn_qkv.weight", (4, 4), packed=False) == Change(transpose=True)
    assert gpt2.change("blk.0.attn_qkv.weight", (4, 4), packed=True) == Change()
    assert gpt2.change("blk.0.attn_qkv.bias", (4, 4), packed=False) == Change()


@pytest.mark.parametrize("name", ["output_norm", "blk.0.attn_norm", "blk.0.attn_q_norm", "blk.0.post_ffw_norm"])
def test_norms_of_gemma_are_stored_with_their_one(name: str) -> None:
    assert family_of("gemma3_text").change(f"{name}.weight", (4, 2), packed=False) == Change(add=1.0)
    assert family_of("qwen3").change(f"{name}.weight", (4, 2), packed=False) == Change()


def test_a_tensor_without_a_name_stops_the_plan(tmp_path: Path) -> None:
    build_model(tmp_path, config("llama"))
    tensors = shards(tmp_path)
    with pytest.raises(PlanError, match="llama has no tensor for model.layers.0.mlp.router.weight"):
        plan(tmp_path, {**tensors, "model.layers.0.mlp.router.weight": torch.zeros(2, 2)})
