"""Links: whatever is done to their channels on both sides, the model computes what it did, in float64 to 1e-10."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import FAMILIES, LIKE_LLAMA, VOCABULARY, build_model
from torch import Tensor

from llmshrink.io import safetensors
from llmshrink.model import families
from llmshrink.model.anatomy import Group
from llmshrink.model.edits import Edit, Place, changed
from llmshrink.model.flow import Flow, Link, flow_of
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.model.task import task_of
from llmshrink.transforms.base import Diagonal
from llmshrink.transforms.rotation import Rotation

SAME = 1e-10
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("GemmaConfig", {"head_dim": 16, "hidden_act": "gelu_pytorch_tanh"}),
    "gemma-tied": ("GemmaConfig", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 96,
        },
    ),
    "granite": ("GraniteConfig", {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "smollm3": ("SmolLM3Config", {}),
    "phi": ("PhiConfig", {}),
    "starcoder2": ("Starcoder2Config", {}),
    "opt-gelu": ("OPTConfig", {"ffn_dim": 128, "activation_function": "gelu", "init_std": 0.2}),
    "opt-after": ("OPTConfig", {"ffn_dim": 128, "do_layer_norm_before": False, "init_std": 0.2}),
    "bloom-after": ("BloomConfig", {"apply_residual_connection_post_layernorm": True}),
    "falcon-one-norm": (
        "FalconConfig",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "odd": ("LlamaConfig", {"hidden_size": 60, "intermediate_size": 72, "head_dim": 12}),
}
ENCODERS = ("bert", "roberta", "xlm", "distilbert", "electra", "mpnet", "modernbert")
KNOWN = [name for name in FAMILIES if not name.startswith(ENCODERS)] + list(MORE)
TURNED = {"llama", "mistral", "qwen2", "qwen3", "qwen3-moe", "mixtral", "phi3"}
TURNED |= {"gemma", "qwen2-moe", "granite", "smollm3", "odd"}


@pytest.fixture(scope="module")
def folder(models_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's tiny float64 model; norms and biases are not trivial."""
    root = tmp_path_factory.mktemp("flow")

    def find(family: str) -> Path:
        if family in FAMILIES:
            return models_folder(family, torch.float64)
        if not (path := root / family).exists():
            name, differs = MORE[family]
            build_model(path, getattr(transformers, name)(**{**LIKE_LLAMA, **differs}), torch.float64)
        return path

    return find


def opened(folder: Path) -> tuple[StreamedModel, Flow]:
    model = StreamedModel(open_source(str(folder)), torch.device("cpu"))
    flow = flow_of(model)
    assert flow is not None
    return model, flow


@contextmanager
def in_float64() -> Iterator[None]:
    """Models compute norms and softmax in float32, whatever they are loaded in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(Tensor, "float", Tensor.double)
        yield


def outputs(model: StreamedModel) -> Tensor:
    """What transformers computes with the weights as they are read."""
    whole = task_of(model.source.config).loader.from_config(model.source.config, dtype=torch.float64).eval()
    whole.set_experts_implementation("eager")  # the others know no float64
    state = {name: model.map.build(name, model.weights.get) for name in model.map.origins}
    whole.load_state_dict(state, strict=False)
    whole.tie_weights()
    ids = torch.randint(0, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(11))
    with torch.no_grad(), in_float64():
        found = task_of(model.source.config).output(whole(ids))
    assert found.dtype == torch.float64 and found.std() > 0.1
    return found


def difference(model: StreamedModel, edits: Iterable[Edit]) -> float:
    before = outputs(model)
    model.weights.change(edits)
    return float((outputs(model) - before).norm() / before.norm())


def some_scale(width: int, seed: int = 0) -> Diagonal:
    return Diagonal(torch.randn(width, generator=torch.Generator().manual_seed(seed)).exp())


def links_of(flow: Flow) -> list[Link]:
    return [link for block in flow.blocks for link in block.links]


@pytest.mark.parametrize("family", KNOWN)
def test_any_scale_of_any_link_leaves_the_function(family: str, folder: Callable[[str], Path]) -> None:
    model, flow = opened(folder(family))
    edits = [edit for i, link in enumerate(links_of(flow)) for edit in link.edits(some_scale(link.width, i))]
    changed = {edit.place.key for edit in edits}
    assert difference(model, edits) < SAME
    assert all(not torch.equal(model.weights.get(key), model.source.checkpoint.get(key)) for key in changed)


@pytest.mark.parametrize("family", KNOWN)
def test_values_can_be_turned(family: str, folder: Callable[[str], Path]) -> None:
    model, flow = opened(folder(family))
    links = [link for link in links_of(flow) if link.kind == "values"]
    assert len(links) == len(flow.blocks)
    assert difference(model, [edit for link in links for edit in link.edits(Rotation(link.size, 3))]) < SAME


@pytest.mark.parametrize("family", KNOWN)
def test_states_can_be_turned_or_it_says_why_not(family: str, folder: Callable[[str], Path]) -> None:
    model, flow = opened(folder(family))
    assert (flow.fixed is None) == (family in TURNED), flow.fixed
    if flow.fixed is None:
        assert difference(model, flow.turned(model.weights, Rotation(model.hidden, 5))) < SAME
        norms = [link.producers[0] for link in links_of(flow) if link.kind == "norm"]
        assert all(torch.all(model.weights.get(norm.key) == 1 - norm.offset) for norm in norms)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3-moe", "phi3", "gemma"])
def test_one_after_another(family: str, folder: Callable[[str], Path]) -> None:
    """Turned states, turned values, then two scales on the same channels."""
    model, flow = opened(folder(family))
    edits = flow.turned(model.weights, Rotation(model.hidden, 5))
    for link in links_of(flow):
        edits += link.edits(Rotation(link.size, 3)) if link.kind == "values" else []
        edits += [*link.edits(some_scale(link.width)), *link.edits(some_scale(link.width, 1))]
    assert difference(model, edits) < SAME


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "falcon"])
def test_a_side_that_is_forgotten_is_seen(family: str, folder: Callable[[str], Path]) -> None:
    """The control: without any one of its edits, no link leaves the function as it is."""
    model, flow = opened(folder(family))
    before = outputs(model)
    for link in flow.blocks[0].links:
        edits = link.edits(some_scale(link.width))
        for missing in edits:
            model.weights.edits.clear()
            model.weights.change(edit for edit in edits if edit is not missing)
            bias = missing.place.key.endswith(".bias")
            assert (outputs(model) - before).norm() / before.norm() > (1e-4 if bias else 1e-2), missing.place


def test_no_flow_is_known_of_other_families(folder: Callable[[str], Path]) -> None:
    assert flow_of(StreamedModel(open_source(str(folder("bert"))), torch.device("cpu"))) is None


def test_a_link_is_left_where_something_else_reads_it(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a family's data forgets, the anatomy knows: it was found by running a block."""
    norms = {"input_layernorm": ("self_attn.q_proj", "self_attn.v_proj")}
    monkeypatch.setitem(families.FAMILIES, "llama", replace(families._LLAMA, norms=norms))
    _, flow = opened(folder("llama"))
    assert not any(link.kind == "norm" for link in links_of(flow)) and flow.fixed is not None
    assert flow.missing[0] == ("model.layers.0.input_layernorm", "self_attn.k_proj reads it too")


def test_experts_in_one_tensor_are_left(folder: Callable[[str], Path], tmp_path: Path) -> None:
    model, _ = opened(folder("qwen3-moe"))
    copy = shutil.copytree(folder("qwen3-moe"), tmp_path / "fused")
    state = {name: model.map.build(name, model.weights.get) for name in model.map.origins}
    safetensors.write(copy / safetensors.SINGLE, state)
    _, flow = opened(copy)
    assert [link.kind for link in flow.blocks[0].links] == ["norm", "values"]
    assert ("model.layers.0.post_attention_layernorm", "mlp.experts.gate_up_proj is no matrix") in flow.missing
    assert flow.fixed is not None and "mlp.experts.gate_up_proj is no matrix" in flow.fixed


def test_an_edit_changes_channels_alone() -> None:
    tensor = torch.arange(24.0).view(4, 6)
    place = Place("key", 0, (3, 1), offset=1.0)
    found = changed(tensor, [place.edit(lambda rows: rows * torch.tensor([2.0, 3.0]))], torch.float32)
    expected = tensor.clone()
    expected[3], expected[1] = (tensor[3] + 1) * 2 - 1, (tensor[1] + 1) * 3 - 1
    assert torch.equal(found, expected) and found.dtype == torch.float32


def test_groups_are_those_that_take_the_channels(folder: Callable[[str], Path]) -> None:
    _, flow = opened(folder("qwen3-moe"))
    norm = next(link for link in flow.blocks[0].links if "post_attention" in link.name)
    assert len(norm.groups) == 4 and all(isinstance(group, Group) for group in norm.groups)  # one for each expert
    keys = {place.key for place in norm.consumers}
    assert any(key.endswith("mlp.gate.weight") for key in keys) and len(keys) == 9
