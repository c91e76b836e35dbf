"""Blocks, matrices and groups are found by structure, for each family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, config
from torch import nn

from llmshrink.errors import PlanError
from llmshrink.model.anatomy import block_list
from llmshrink.model.skeleton import build
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel

CPU = torch.device("cpu")
Models = Callable[..., Path]

ATTENTION = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}]
LLAMA = [*ATTENTION, {"gate_proj", "up_proj"}, {"down_proj"}]
EXPERTS = [
    names
    for e in range(4)
    for names in ({f"experts.{e}.gate_proj", f"experts.{e}.up_proj"}, {f"experts.{e}.down_proj"})
]
OPT = [{"q_proj", "k_proj", "v_proj"}, {"out_proj"}, {"fc1"}, {"fc2"}]
BLOOM = [{"query_key_value"}, {"dense"}, {"dense_h_to_4h"}, {"dense_4h_to_h"}]
BERT_END = [{"attention.output.dense"}, {"intermediate.dense"}, {"output.dense"}]
BERT = [{"self.query", "self.key", "self.value"}, *BERT_END]
# What differs from Llama; blocks that differ from each other are listed one by one.
GROUPS = {
    "gpt2": [{"attn.c_attn"}, {"attn.c_proj"}, {"mlp.c_fc"}, {"mlp.c_proj"}],
    "phi3": [{"qkv_proj"}, {"o_proj"}, {"gate_up_proj"}, {"down_proj"}],
    "opt": OPT,
    "opt-projected": OPT,
    "gpt-neox": BLOOM,
    "bloom": BLOOM,
    "falcon": [{"query_key_value", "dense_h_to_4h"}, {"dense"}, {"dense_4h_to_h"}],
    "falcon-new": BLOOM,
    "falcon-alibi": BLOOM,
    **dict.fromkeys(("bert", "bert-masked", "bert-classes", "roberta", "xlm-roberta-tokens", "electra"), BERT),
    "distilbert": [{"q_lin", "k_lin", "v_lin"}, {"out_lin"}, {"lin1"}, {"lin2"}],
    "mpnet": [{"attn.q", "attn.k", "attn.v"}, {"attn.o"}, *BERT_END[1:]],
    "modernbert": [{"attn.Wqkv"}, {"attn.Wo"}, {"mlp.Wi"}, {"mlp.Wo"}],
}
EACH_BLOCK = {
    "qwen3-moe": [[*ATTENTION, *EXPERTS], LLAMA],
    "mixtral": [
        [*ATTENTION, *({f"experts.{e}.{w}" for w in pair} for e in range(4) for pair in (("w1", "w3"), ("w2",)))]
    ]
    * 2,
}


def streamed(folder: Path) -> StreamedModel:
    return StreamedModel(open_source(str(folder)), CPU)


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_are_the_linears_fed_by_one_tensor(models_folder: Models, family: str) -> None:
    blocks = streamed(models_folder(family)).anatomy.blocks
    assert [block.index for block in blocks] == [0, 1]
    for block, expected in zip(blocks, EACH_BLOCK.get(family) or [GROUPS.get(family, LLAMA)] * 2, strict=True):
        # In the order of the forward pass; names as far as they tell apart.
        assert len(block.groups) == len(expected)
        for group, names in zip(block.groups, expected, strict=True):
            assert len(group.matrices) == len(names)
            assert all(any(m.name.endswith(f".{name}") for name in names) for m in group.matrices), group
            assert len({m.shape[1] for m in group.matrices}) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_no_weight_of_a_block_is_missed(models_folder: Models, family: str) -> None:
    model = streamed(models_folder(family))
    infos = model.weights.infos
    seen = [key for block in model.anatomy.blocks for key in block.keys]
    assert len(seen) == len(set(seen))
    assert set(seen) | set(model.anatomy.others) | set(model.anatomy.unused) == set(infos)
    for block in model.anatomy.blocks:
        big = {key for key in block.keys if len(infos[key].shape) >= 2}
        matrices, left = {m.key for m in block.matrices}, {key for key, _ in block.left}
        assert matrices | left == big and not matrices & left
        # Routers are small and decide much: left as they are.
        assert all(key.endswith(".gate.weight") for key in left)
    assert any(block.left for block in model.anatomy.blocks) == (family in EACH_BLOCK)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_matrix_is_seen_as_out_by_in(models_folder: Models, family: str) -> None:
    model = streamed(models_folder(family))
    for block in model.anatomy.blocks:
        for matrix in block.matrices:
            assert tuple(model.read(matrix).shape) == matrix.shape
            assert matrix.transposed == (family == "gpt2")
            owner = model.model.get_submodule(matrix.site.module)
            if isinstance(owner, nn.Linear):
                assert matrix.shape == (owner.out_features, owner.in_features)


def test_a_layout_that_is_not_known_is_refused_by_name() -> None:
    model = build(config("llama"), torch.float32)
    model.config.num_hidden_layers = 5
    with pytest.raises(PlanError, match=r"LlamaForCausalLM: .* 5 blocks; lists: layers \(2 x LlamaDecoder"):
        block_list(model)
    model.config.num_hidden_layers = 2
    model.model.more = nn.ModuleList(model.model.layers)
    with pytest.raises(PlanError, match=r"lists: layers \(2 x .*, more \(2 x"):
        block_list(model)


def test_blocks_that_are_not_called_one_after_another_are_refused(
    models_folder: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaModel

    forward = LlamaModel.forward

    def shuffled(self: LlamaModel, *args: object, **kwargs: object) -> object:
        first = self.layers[0]
        original = first.forward
        first.forward = lambda *a, **k: original(*a, **k) + 1  # type: ignore[method-assign]
        try:
            return forward(self, *args, **kwargs)
        finally:
            first.forward = original  # type: ignore[method-assign]

    monkeypatch.setattr(LlamaModel, "forward", shuffled)
    with pytest.raises(PlanError, match="LlamaForCausalLM: its blocks cannot be run one by one"):
        streamed(models_folder("llama"))
