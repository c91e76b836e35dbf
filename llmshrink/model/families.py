"""What follows what inside a block, family by family: data that no structure tells.

A name is that of a module in memory, below the block. Of a tuple of readers those count that a block has: so one line
serves dense blocks and blocks of experts. `model/flow.py` makes links between tensors on disk of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from transformers import PretrainedConfig

Layout = Literal["own", "last", "grouped"]
"""Where the values lie: in a matrix of their own, in the last rows, or behind the queries and keys of their group."""


@dataclass(frozen=True)
class Family:
    """One kind of block.

    Attributes:
        norms: A norm, and everything that reads what it gives.
        values: What makes the values of attention, and what reads the heads.
        layout: Where the values lie in the former.
        products: What makes a factor of an elementwise product, or passes a ReLU, and what reads the product.
        halves: The factor is the second half of its matrix, the first is the gate.
        up: What experts call the factor on disk.
        writers: What adds to the states between blocks; empty where these cannot be turned.
        fixed: Why they cannot.
        offset: What norms add to their weight.
        final: The norm behind the blocks.
    """

    norms: Mapping[str, tuple[str, ...]]
    values: tuple[str, str]
    layout: Layout = "own"
    products: Mapping[str, str] = field(default_factory=dict)
    halves: bool = False
    up: str = "up_proj"
    writers: tuple[str, ...] = ()
    fixed: str = "its norms subtract the mean of the states, which a rotation does not keep"
    offset: float = 0.0
    final: str = "norm"


_QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
_MLP = ("mlp.gate_proj", "mlp.up_proj")
_MOE = (
    "mlp.gate",
    "mlp.experts.gate_up_proj",
    "mlp.shared_expert.gate_proj",
    "mlp.shared_expert.up_proj",
    "mlp.shared_expert_gate",
)
_PRODUCTS = {
    "mlp.up_proj": "mlp.down_proj",
    "mlp.experts.gate_up_proj": "mlp.experts.down_proj",
    "mlp.shared_expert.up_proj": "mlp.shared_expert.down_proj",
}
_LLAMA = Family(
    norms={"input_layernorm": _QKV, "post_attention_layernorm": (*_MLP, *_MOE)},
    values=("self_attn.v_proj", "self_attn.o_proj"),
    products=_PRODUCTS,
    writers=("self_attn.o_proj", *_PRODUCTS.values()),
)
_SANDWICH = "norms behind its layers see the states before they are added"
_GEMMA2 = replace(
    _LLAMA,
    norms={"input_layernorm": _QKV, "pre_feedforward_layernorm": _MLP},
    writers=(),
    fixed=_SANDWICH,
    offset=1.0,
)
_PHI3 = replace(
    _LLAMA,
    norms={"input_layernorm": ("self_attn.qkv_proj",), "post_attention_layernorm": ("mlp.gate_up_proj",)},
    values=("self_attn.qkv_proj", "self_attn.o_proj"),
    layout="last",
    products={"mlp.gate_up_proj": "mlp.down_proj"},
    halves=True,
)
_GPT2 = Family(
    norms={"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)}, values=("attn.c_attn", "attn.c_proj"), layout="last"
)
_STARCODER2 = Family(
    norms={"input_layernorm": _QKV, "post_attention_layernorm": ("mlp.c_fc",)},
    values=("self_attn.v_proj", "self_attn.o_proj"),
)
_PHI = Family(norms={"input_layernorm": (*_QKV, "mlp.fc1")}, values=("self_attn.v_proj", "self_attn.dense"))
_NEOX = Family(
    norms={"input_layernorm": ("attention.query_key_value",), "post_attention_layernorm": ("mlp.dense_h_to_4h",)},
    values=("attention.query_key_value", "attention.dense"),
    layout="grouped",
)


def _opt(config: PretrainedConfig) -> Family:
    norms = {"self_attn_layer_norm": _QKV, "final_layer_norm": ("fc1",)}
    return Family(
        norms=norms if config.do_layer_norm_before else {},  # else a norm gives the very states that are handed on
        values=("self_attn.v_proj", "self_attn.out_proj"),
        products={"fc1": "fc2"} if config.activation_function == "relu" else {},
    )


def _bloom(config: PretrainedConfig) -> Family:
    norms = {
        "input_layernorm": ("self_attention.query_key_value",),
        "post_attention_layernorm": ("mlp.dense_h_to_4h",),
    }
    return Family(
        norms={} if config.apply_residual_connection_post_layernorm else norms,
        values=("self_attention.query_key_value", "self_attention.dense"),
        layout="grouped",
    )


def _falcon(config: PretrainedConfig) -> Family:
    qkv, up = "self_attention.query_key_value", "mlp.dense_h_to_4h"
    norms: dict[str, tuple[str, ...]] = {"ln_attn": (qkv,), "ln_mlp": (up,)}
    if not config.parallel_attn:
        norms = {"input_layernorm": (qkv,), "post_attention_layernorm": (up,)}
    elif not config.new_decoder_architecture or config.num_ln_in_parallel_attn == 1:
        norms = {"input_layernorm": (qkv, up)}
    return Family(norms=norms, values=(qkv, "self_attention.dense"), layout="grouped")


FAMILIES: dict[str, Family | Callable[[PretrainedConfig], Family]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "granite", "smollm3"), _LLAMA),
    "mixtral": replace(_LLAMA, up="w3"),
    "gemma": replace(_LLAMA, offset=1.0),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA2),
    "phi3": _PHI3,
    "olmo2": replace(_LLAMA, norms={}, writers=(), fixed=_SANDWICH),
    "gpt2": _GPT2,
    "opt": _opt,
    "phi": _PHI,
    "starcoder2": _STARCODER2,
    "gpt_neox": _NEOX,
    "bloom": _bloom,
    "falcon": _falcon,
}
"""By transformers' model_type."""


def family_of(config: PretrainedConfig) -> Family | None:
    """What follows what in the blocks of a model, or None where nobody wrote it down."""
    found = FAMILIES.get(config.model_type)
    return found if found is None or isinstance(found, Family) else found(config)
