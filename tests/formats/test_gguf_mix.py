"""Which type each tensor gets: what llama.cpp's own quantizer chose for the same places."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from gguf import LlamaFileType

from llmshrink.block_types import BLOCK_TYPES
from llmshrink.formats.gguf_mix import MIXES, Place, Role, tensor_type

EVERY = range(32)
MARKED = {*range(4), 6, 9, 12, 15, 18, 21, 24, 27, *range(28, 32)}  # of 32 layers


def types(mix: str, role: Role, **place: Any) -> list[str]:
    """Of all layers of a model of 32."""
    return [tensor_type(mix, Place(role, 4096, layer, 32, **place)) for layer in EVERY]


def test_every_mix_is_one_of_gguf() -> None:
    assert all({f"MOSTLY_{name}", f"ALL_{name}"} & LlamaFileType.__members__.keys() for name in MIXES)


@pytest.mark.parametrize(("mix", "usual"), [("Q4_K_M", "Q4_K"), ("Q5_K_M", "Q5_K")])
def test_the_medium_mixes_give_half_of_two_roles_six_bits(mix: str, usual: str) -> None:
    wanted = ["Q6_K" if layer in MARKED else usual for layer in EVERY]
    assert types(mix, "attn_v") == types(mix, "ffn_down") == types(mix, "attn_qkv") == wanted
    for role in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"):
        assert set(types(mix, role)) == {usual}
    assert tensor_type(mix, Place("token_embd", 4096)) == usual
    assert tensor_type(mix, Place("token_embd", 4096, tied=True)) == "Q6_K"
    assert tensor_type(mix, Place("output", 4096)) == "Q6_K"


def test_the_small_mixes() -> None:
    assert types("Q4_K_S", "attn_v") == types("Q4_K_S", "ffn_down") == ["Q5_K"] * 4 + ["Q4_K"] * 28
    assert types("Q3_K_M", "attn_v") == ["Q5_K"] * 2 + ["Q4_K"] * 30
    assert types("Q3_K_M", "ffn_down") == ["Q5_K"] * 2 + ["Q4_K"] * 30
    assert set(types("Q3_K_M", "attn_output")) == {"Q4_K"}
    assert set(types("Q3_K_S", "attn_v") + types("Q3_K_S", "ffn_down")) == {"Q3_K"}
    assert set(types("Q2_K", "attn_v")) == {"Q3_K"} and set(types("Q2_K", "attn_v", heads_per_kv=4)) == {"Q4_K"}
    assert set(types("Q2_K", "ffn_down") + types("Q2_K", "attn_output")) == {"Q3_K"}
    assert set(types("Q2_K", "attn_q") + types("Q2_K", "ffn_up")) == {"Q2_K"}


def test_plain_types() -> None:
    for mix in ("F32", "F16", "BF16"):
        assert {tensor_type(mix, Place(role, 100)) for role in get_args(Role)} == {mix}
    assert {tensor_type("Q8_0", Place(role, 4096)) for role in get_args(Role)} == {"Q8_0"}
    assert tensor_type("Q4_0", Place("output", 4096)) == "Q6_K"
    assert types("Q4_0", "ffn_down") == ["Q4_0"] * 32
    assert types("Q4_0", "ffn_down", importance=True) == ["Q4_1"] * 4 + ["Q4_0"] * 28
    assert types("Q5_0", "ffn_down", importance=True) == ["Q5_1"] * 4 + ["Q5_0"] * 28
    assert tensor_type("TQ1_0", Place("token_embd", 4096)) == "Q4_K"
    assert tensor_type("TQ2_0", Place("attn_v", 4096)) == "TQ2_0"


def test_models_of_special_shapes() -> None:
    assert tensor_type("Q4_K_M", Place("attn_v", 8192, 20, 80, heads_per_kv=8)) == "Q5_K"
    assert tensor_type("Q3_K_S", Place("attn_v", 8192, 20, 80, heads_per_kv=8)) == "Q5_K"


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("width", [4096, 288, 100])
def test_blocks_are_whole_or_something_else_stands_in(mix: str, width: int) -> None:
    for role in get_args(Role):
        found = tensor_type(mix, Place(role, width))
        assert found not in BLOCK_TYPES or width % BLOCK_TYPES[found].size == 0
    narrow = {"Q2_K": "Q4_0", "Q3_K_S": "Q4_0", "Q4_K_S": "Q5_0", "Q5_K_S": "Q5_1", "Q6_K": "Q8_0", "TQ2_0": "Q4_0"}
    if mix in narrow:
        assert tensor_type(mix, Place("attn_q", 288)) == narrow[mix]
        assert tensor_type(mix, Place("output", 288)) == "Q8_0"
    if mix[0] in "QT":
        assert tensor_type(mix, Place("attn_q", 100)) == "F16"
