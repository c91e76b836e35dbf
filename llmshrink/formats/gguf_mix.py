"""Which type each tensor of a GGUF file gets under the mixes that users name, such as Q4_K_M.

A mix has one type for most matrices and a better one where errors cost more: in attn_v (small, and shared by several
heads), in ffn_down, in the output head, in the first and the last layers. The choices are those of llama.cpp's
`llama-quant.cpp`, so that a file has the size that its name makes one expect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from llmshrink.block_types import BLOCK_TYPES

Role = Literal[
    "token_embd",
    "output",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_qkv",
    "attn_output",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
    "other",
]


# By the names that users know: the type of most matrices.
MIXES: dict[str, str] = {
    "F32": "F32",
    "F16": "F16",
    "BF16": "BF16",
    "Q4_0": "Q4_0",
    "Q4_1": "Q4_1",
    "Q5_0": "Q5_0",
    "Q5_1": "Q5_1",
    "Q8_0": "Q8_0",
    "Q2_K": "Q2_K",
    "Q3_K_S": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K",
    "Q6_K": "Q6_K",
    "TQ1_0": "TQ1_0",
    "TQ2_0": "TQ2_0",
}


SAID = {"bits", "group_size", "symmetric", "scales", "type"}
"""The settings of a method that a mix, or a block type, says."""


@dataclass(frozen=True)
class Place:
    """Where in a model a matrix is, as far as a mix looks at it."""

    role: Role
    width: int  # inputs of the matrix
    layer: int = 0  # number of its block, from 0
    layers: int = 1  # blocks of the model
    heads_per_kv: int = 1  # attention heads that share a key and a value
    tied: bool = False  # the output head is the token embedding
    importance: bool = False  # the inputs' mean squares weight the errors

    @property
    def early(self) -> bool:
        """In the first eighth."""
        return self.layer < self.layers // 8

    @property
    def marked(self) -> bool:
        """In the first or the last eighth, or every third between."""
        first, last = self.layers // 8, 7 * self.layers // 8
        return self.early or self.layer >= last or (self.layer - first) % 3 == 2


def _always(place: Place) -> bool:
    return True


# For a mix and a role: the type that it gets where a condition holds, the first that does; else the usual one.
BETTER: dict[tuple[str, Role], tuple[tuple[Callable[[Place], bool], str], ...]] = {
    ("Q2_K", "attn_v"): ((lambda p: p.heads_per_kv >= 4, "Q4_K"), (_always, "Q3_K")),
    ("Q2_K", "attn_output"): ((_always, "Q3_K"),),
    ("Q2_K", "ffn_down"): ((_always, "Q3_K"),),
    ("Q3_K_M", "attn_v"): ((lambda p: p.layer < 2, "Q5_K"), (_always, "Q4_K")),
    ("Q3_K_M", "attn_output"): ((_always, "Q4_K"),),
    ("Q3_K_M", "ffn_down"): ((lambda p: p.layer < p.layers // 16, "Q5_K"), (_always, "Q4_K")),
    ("Q4_K_S", "attn_v"): ((lambda p: p.layer < 4, "Q5_K"),),
    ("Q4_K_S", "ffn_down"): ((lambda p: p.early, "Q5_K"),),
    ("Q4_K_M", "attn_v"): ((lambda p: p.marked, "Q6_K"),),
    ("Q4_K_M", "ffn_down"): ((lambda p: p.marked, "Q6_K"),),
    ("Q5_K_M", "attn_v"): ((lambda p: p.marked, "Q6_K"),),
    ("Q5_K_M", "ffn_down"): ((lambda p: p.marked, "Q6_K"),),
    ("Q4_0", "ffn_down"): ((lambda p: p.importance and p.early, "Q4_1"),),
    ("Q5_0", "ffn_down"): ((lambda p: p.importance and p.early, "Q5_1"),),
    ("TQ1_0", "token_embd"): ((_always, "Q4_K"),),
    ("TQ2_0", "token_embd"): ((_always, "Q4_K"),),
}
# What stands in where a row is not whole blocks of 256; F16 where it is not whole blocks of 32 either.
NARROWER = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "TQ1_0": "Q4_0",
    "TQ2_0": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}


def tensor_type(mix: str, place: Place) -> str:
    """The type of a matrix under a mix: a name of `BLOCK_TYPES`, F16, BF16 or F32.

    Args:
        mix: a name of `MIXES`.
        place: where the matrix is.
    """
    found = wanted_type(mix, place)
    return _fitting(found, place.width) if found in BLOCK_TYPES else found


def wanted_type(mix: str, place: Place) -> str:
    """The type before its blocks are held against the width."""
    usual = MIXES[mix]
    if usual not in BLOCK_TYPES:
        return usual
    role: Role = "attn_v" if place.role == "attn_qkv" else place.role
    if role == "output" or (role == "token_embd" and place.tied):
        return "Q8_0" if usual == "Q8_0" or place.width % BLOCK_TYPES[usual].size else "Q6_K"
    found = next((better for holds, better in BETTER.get((mix, role), ()) if holds(place)), usual)
    if role == "attn_v" and place.layers == 80 and place.heads_per_kv > 1 and found in ("Q3_K", "Q4_K"):
        return "Q5_K"  # of models of 70 billion parameters, whose attn_v is an eighth of attn_q
    return found


def _fitting(name: str, width: int) -> str:
    """The type itself, or what stands in for it where the width is not whole blocks."""
    if width % BLOCK_TYPES[name].size == 0:
        return name
    name = NARROWER.get(name, name)
    return "F16" if width % BLOCK_TYPES[name].size else name


ROLES: dict[str, Role] = {role: role for role in get_args(Role)}
"""By llama.cpp's names of tensors."""
