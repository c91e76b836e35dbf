"""What is said of a model, and what is refused because llama.cpp would compute something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gguf_files import CHANGES, FAMILIES
from tiny import config

from llmshrink.errors import PlanError
from llmshrink.gguf.metadata import describe
from llmshrink.gguf.names import family_of

THETA = {"rope_theta": 10000.0}
ORIGINAL = {**THETA, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}
LONG = {"rope_type": "longrope", "factor": 4.0, "long_factor": [2.0] * 8, "short_factor": [1.0] * 8, **ORIGINAL}


def described(family: str, **more: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor], list[str]]:
    found = config(family, **{**CHANGES.get(family, {}), **more})
    return describe(found, family_of(found.model_type).architecture)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_its_shape(family: str) -> None:
    values, _, _ = described(family)
    (architecture,) = {key.partition(".")[0] for key in values}
    assert architecture == family_of(config(family).model_type).architecture
    said = {key.partition(".")[2]: value for key, value in values.items()}
    assert (said["block_count"], said["embedding_length"], said["context_length"]) == (2, 64, 128)
    assert said["attention.head_count"] == 4
    assert said["attention.head_count_kv"] == (4 if family == "gpt2" else 2)
    assert said["feed_forward_length"] == (256 if family == "gpt2" else 128)
    assert said.get("attention.key_length") == {"gpt2": None, "qwen3": 32}.get(family, 16)


def test_soft_caps_and_windows_of_gemma_are_said() -> None:
    values, _, notes = described("gemma2", attn_logit_softcapping=40.0)
    assert (values["gemma2.attn_logit_softcapping"], values["gemma2.final_logit_softcapping"]) == (40.0, 30.0)
    assert (values["gemma2.attention.sliding_window"], values["gemma2.attention.sliding_window_pattern"]) == (16, 2)
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    values, _, _ = described("gemma3", num_hidden_layers=4, layer_types=kinds)
    assert values["gemma3.attention.sliding_window_pattern"] == 3
    assert (values["gemma3.rope.freq_base"], values["gemma3.rope.freq_base_swa"]) == (1e6, 1e4)
    assert notes == []


def test_divisors_of_frequencies_are_those_of_transformers() -> None:
    _, tensors, _ = described("llama", rope_parameters=LLAMA3)
    divisors = tensors["rope_freqs.weight"]
    assert divisors.shape == (8,) and divisors.dtype == torch.float32
    assert divisors[0] == 1 and divisors[-1] == pytest.approx(8.0) and 1 < divisors[1] < 8
    values, tensors, notes = described("phi3", rope_parameters=LONG, original_max_position_embeddings=32)
    assert tensors["rope_factors_long.weight"].tolist() == [2.0] * 8
    assert tensors["rope_factors_short.weight"].tolist() == [1.0] * 8
    assert values["phi3.rope.scaling.attn_factor"] == pytest.approx((1 + 0.4) ** 0.5)  # ln 4 / ln 32
    assert "-c 32" in notes[0]


@pytest.mark.parametrize(
    ("family", "more", "word"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act silu, and this one has 'gelu'"),
        ("qwen2", {"head_dim": 32}, "hidden size"),
        ("gemma2", {"hidden_activation": "silu"}, "hidden_activation"),
        ("gemma2", {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar 256"),
        ("gemma2", {"final_logit_softcapping": None}, "soft caps"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"layer_types": ["full_attention", "sliding_attention"]}, "every n-th block"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"activation_function": "relu"}, "activation_function"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **THETA}}, "'dynamic' for llama"),
        ("qwen2", {"rope_parameters": LLAMA3}, "'llama3' for qwen2"),
        ("llama", {"rope_parameters": LONG}, "'longrope' for llama"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 2.0, **ORIGINAL}},
            "YaRN",
        ),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": False, **ORIGINAL}}, "YaRN"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, **THETA}}, "whole heads"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(family: str, more: dict[str, Any], word: str) -> None:
    with pytest.raises(PlanError, match=word):
        described(family, **more)


@pytest.mark.parametrize(
    ("family", "more", "windows"),
    [
        ("mistral", {}, True),
        ("mistral", {"sliding_window": None}, False),
        ("mistral", {"sliding_window": 128}, False),
        ("qwen2", {"sliding_window": 16}, False),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True}, True),
        ("phi3", {"sliding_window": 16}, True),
        ("llama", {}, False),
    ],
)
def test_a_window_that_llama_cpp_has_not_is_told(family: str, more: dict[str, Any], windows: bool) -> None:
    _, _, notes = described(family, **more)
    assert [f"from {16} tokens" in note for note in notes] == [True] * windows
