"""A model's configuration in llama.cpp's words, refused where llama.cpp would compute something else.

llama.cpp knows an architecture by its name, and takes much of it for granted: what is not asked for in the metadata is
checked here against what it assumes. Sources: llama.cpp's src/models/ and src/llama-arch.cpp.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from llmshrink.errors import PlanError
from llmshrink.gguf.rope import rope
from llmshrink.io.gguf import Value

SILU = {"hidden_act": ("silu", "swish")}
GELU = {"hidden_activation": ("gelu_pytorch_tanh",)}
ASSUMED: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": SILU,
    "qwen2": SILU,
    "qwen3": SILU,
    "phi3": SILU,
    "gemma2": {**GELU, "use_bidirectional_attention": (False, None)},
    "gemma3": {
        **GELU,
        "use_bidirectional_attention": (False, None),
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
    },
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
}
"""For each architecture, the values that a setting may have where the model has it."""

SQUARE = ("qwen2", "phi3")  # architectures whose heads must add up to the hidden size
BIGGEST = {"gemma2": 46, "gemma3": 62}  # blocks of those 27B models whose attention is scaled by another width


def describe(config: PretrainedConfig, architecture: str) -> tuple[dict[str, Value], dict[str, Tensor], list[str]]:
    """What llama.cpp must know of a model besides its weights and vocabulary.

    Returns:
        Metadata; small float32 tensors by their names in the file; what a user should know of the result.

    Raises:
        PlanError: llama.cpp would compute something else.
    """
    for name, allowed in ASSUMED[architecture].items():
        if (found := getattr(config, name, allowed[0])) not in allowed:
            raise PlanError(
                f"llama.cpp runs every {architecture} with {name} {allowed[0]}, and this one has {found!r}."
            )
    heads, width = config.num_attention_heads, config.hidden_size
    head = getattr(config, "head_dim", None) or width // heads
    if architecture in SQUARE and head * heads != width:
        raise PlanError(f"llama.cpp runs {architecture} only where head_dim * heads is the hidden size ({width}).")
    values: dict[str, Value] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": width,
        "feed_forward_length": _feed_forward(config),
        "attention.head_count": heads,
        "attention.head_count_kv": heads,
        "vocab_size": config.vocab_size,
    }
    if architecture == "gpt2":
        values["attention.layer_norm_epsilon"] = float(config.layer_norm_epsilon)
        return _prefixed(architecture, values), {}, []
    values |= {
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }
    settings, tensors = rope(config, architecture, head)
    values |= settings
    if architecture.startswith("gemma"):
        values |= _gemma(config, architecture, head)
        return _prefixed(architecture, values), tensors, []
    return _prefixed(architecture, values), tensors, _windows(config) + _factors(config, tensors)


def _prefixed(architecture: str, values: dict[str, Value]) -> dict[str, Value]:
    return {f"{architecture}.{name}": value for name, value in values.items()}


def _feed_forward(config: PretrainedConfig) -> int:
    if hasattr(config, "n_inner"):
        return int(config.n_inner or 4 * config.hidden_size)
    return int(config.intermediate_size)


def _windows(config: PretrainedConfig) -> list[str]:
    """What is lost of a sliding window where llama.cpp has none for the architecture."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if not window or window >= config.max_position_embeddings:
        return []
    return [
        f"llama.cpp runs {config.model_type} without its sliding window: from {window} tokens on it attends to more "
        "than the model was trained with."
    ]


def _factors(config: PretrainedConfig, tensors: dict[str, Tensor]) -> list[str]:
    """When llama.cpp takes the divisors for long texts."""
    if "rope_factors_long.weight" not in tensors:
        return []
    original = config.rope_parameters["original_max_position_embeddings"]
    return [
        f"With a context of more than {original} tokens llama.cpp computes positions of short texts too as those of "
        f"long ones: give it `-c {original}` where that is enough."
    ]


def _gemma(config: PretrainedConfig, architecture: str, head: int) -> dict[str, Value]:
    """The window and its pattern (every n-th block sees all), the caps, and the scale that is not asked for."""
    wide = config.num_hidden_layers == BIGGEST[architecture]
    scale = config.hidden_size // config.num_attention_heads if wide else head
    if config.query_pre_attn_scalar != scale:
        raise PlanError(
            f"llama.cpp scales the attention of {architecture} with {config.num_hidden_layers} blocks by "
            f"{scale}^-0.5, and this one has query_pre_attn_scalar {config.query_pre_attn_scalar}."
        )
    full = [kind == "full_attention" for kind in config.layer_types]
    period = full.index(True) + 1 if any(full) else len(full) + 1
    if full != [n % period == period - 1 for n in range(len(full))]:
        raise PlanError(f"llama.cpp runs {architecture} only where every n-th block has full attention.")
    values: dict[str, Value] = {
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": period,
    }
    if architecture == "gemma2":
        caps = {"attn_logit_softcapping": config.attn_logit_softcapping}
        caps["final_logit_softcapping"] = config.final_logit_softcapping
        if not all(caps.values()):
            raise PlanError("llama.cpp runs gemma2 only with both of its soft caps.")
        values |= {name: float(cap) for name, cap in caps.items()}
    return values
