"""The names of a model's tensors in transformers and in llama.cpp, and what is changed on the way.

A family is data: pairs of module names. What llama.cpp wants otherwise than transformers has it:
- `llama` rotates neighbouring values, transformers the two halves of a head: rows of q and k are interleaved;
- norms of Gemma are stored without the 1 that is added to them, llama.cpp stores the sum;
- GPT-2's Conv1D keeps its weights as [in, out].
All of these move whole rows or touch what is never quantized, so they work on packed matrices too.

Source of the names: gguf-py's tensor_mapping, with which the tests compare them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from llmshrink.errors import PlanError

BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.(bias|masked_bias))")
"""Tables that old checkpoints hold beside their weights; every runtime computes them."""
HEAD = "output"
EMBEDDING = "token_embd"
POSITIONS = "position_embd"


@dataclass(frozen=True)
class Change:
    """How a tensor of the checkpoint becomes one of the file."""

    transpose: bool = False
    heads: int = 0  # whose rows are interleaved; 0 for none
    add: float = 0.0

    def forward(self, tensor: Tensor) -> Tensor:
        """From the checkpoint to the file; rows of any content, packed ones too."""
        tensor = tensor.T if self.transpose else tensor
        if self.heads:
            halves = tensor.reshape(self.heads, 2, -1, *tensor.shape[1:])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        return tensor + self.add if self.add else tensor

    def back(self, tensor: Tensor) -> Tensor:
        """From the file to the checkpoint."""
        tensor = tensor - self.add if self.add else tensor
        if self.heads:
            pairs = tensor.reshape(self.heads, -1, 2, *tensor.shape[1:])
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        return tensor.T if self.transpose else tensor


@dataclass(frozen=True)
class Family:
    """Models that llama.cpp runs as one architecture."""

    architecture: str
    prefix: str  # of all keys but the head's
    blocks: str  # what comes before the number of a block
    modules: Mapping[str, str]  # outside of the blocks: transformers' name -> llama.cpp's
    block_modules: Mapping[str, str]
    biases: frozenset[str] = frozenset()  # llama.cpp's names of what may have a bias
    interleaved: bool = False
    norms_add: float = 0.0
    transposed: frozenset[str] = frozenset()
    head: bool = True  # whether the head may have weights of its own

    def name(self, key: str) -> str | None:
        """llama.cpp's name of a tensor, or None where it has none."""
        module, _, leaf = key.removeprefix(self.prefix).rpartition(".")
        if match := re.fullmatch(rf"{self.blocks}\.(\d+)\.(.+)", module):
            found, start = self.block_modules.get(match[2]), f"blk.{int(match[1])}."
        else:
            found, start = self.modules.get(module), ""
        if found is None or not (leaf == "weight" or (leaf == "bias" and found in self.biases)):
            return None
        return f"{start}{found}.{leaf}"

    def key(self, name: str) -> str | None:
        """The key of a tensor of llama.cpp's, or None where the checkpoint has no such."""
        part, _, leaf = name.rpartition(".")
        if match := re.fullmatch(r"blk\.(\d+)\.(.+)", part):
            found, start = _reversed(self.block_modules).get(match[2]), f"{self.prefix}{self.blocks}.{match[1]}."
        else:
            found, start = _reversed(self.modules).get(part), "" if part == HEAD else self.prefix
        key = f"{start}{found}.{leaf}"
        return key if found and self.name(key) == name else None

    def change(self, name: str, heads: tuple[int, int], *, packed: bool) -> Change:
        """What happens to a tensor.

        Args:
            name: llama.cpp's.
            heads: of the queries; of the keys and values.
            packed: whether the checkpoint has it as [out, ...] whatever it is when dense.
        """
        module = name.rpartition(".")[0].rpartition(".")[2]
        rows = {"attn_q": heads[0], "attn_k": heads[1]}.get(module, 0) if self.interleaved else 0
        add = self.norms_add if module.endswith("norm") else 0.0
        return Change(
            transpose=module in self.transposed and name.endswith("weight") and not packed, heads=rows, add=add
        )


def _reversed(names: Mapping[str, str]) -> dict[str, str]:
    return {value: key for key, value in names.items()}


_TOP = {"embed_tokens": EMBEDDING, "norm": "output_norm", "lm_head": HEAD}
_QKV = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_OUT = {"self_attn.o_proj": "attn_output"}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_GEMMA_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_LLAMA = Family(
    "llama",
    "model.",
    "layers",
    _TOP,
    _QKV | _OUT | _MLP | _NORMS,
    biases=frozenset({"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}),
    interleaved=True,
)
_PHI3 = {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_GPT2 = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}

FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Family(
        "qwen2", "model.", "layers", _TOP, _QKV | _OUT | _MLP | _NORMS, frozenset({"attn_q", "attn_k", "attn_v"})
    ),
    "qwen3": Family("qwen3", "model.", "layers", _TOP, _QKV | _QK_NORMS | _OUT | _MLP | _NORMS),
    "gemma2": Family("gemma2", "model.", "layers", _TOP, _QKV | _OUT | _MLP | _GEMMA_NORMS, norms_add=1.0, head=False),
    "gemma3_text": Family(
        "gemma3", "model.", "layers", _TOP, _QKV | _QK_NORMS | _OUT | _MLP | _GEMMA_NORMS, norms_add=1.0
    ),
    "phi3": Family("phi3", "model.", "layers", _TOP, _PHI3 | _OUT | _NORMS),
    "gpt2": Family(
        "gpt2",
        "transformer.",
        "h",
        {"wte": EMBEDDING, "wpe": POSITIONS, "ln_f": "output_norm", "lm_head": HEAD},
        _GPT2,
        biases=frozenset({"output_norm", *_GPT2.values()}),
        transposed=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
    ),
}
"""By transformers' model_type."""


def family_of(model_type: str) -> Family:
    """How llama.cpp runs a model.

    Raises:
        PlanError: this one cannot be written as GGUF.
    """
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise PlanError(f"GGUF files can be written of the model types {known}, and this one is {model_type!r}.")
    return FAMILIES[model_type]


def family_read(architecture: object) -> Family | None:
    """The family whose files have this `general.architecture`, or None."""
    return next((family for family in FAMILIES.values() if family.architecture == architecture), None)
