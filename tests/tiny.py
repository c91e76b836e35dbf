"""Tiny random models of each family, their tokenizer, and sentences to calibrate them on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)
from transformers.models.auto import AutoModelForCausalLM

VOCABULARY = 160
# Wide weights: with the default initialisation a zeroed layer hardly moves the logits, and any comparison passes.
WIDE = 0.2


def llama(**more: object) -> LlamaConfig:
    """A two-block Llama with grouped-query attention, widths divisible by 64."""
    settings = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "initializer_range": WIDE,
    }
    return LlamaConfig(**{**settings, **more})


def gpt2(**more: object) -> GPT2Config:
    """A two-block GPT-2: Conv1D layers, learned positions, a tied head."""
    settings = {
        "n_layer": 2,
        "n_embd": 64,
        "n_head": 4,
        "vocab_size": VOCABULARY,
        "n_positions": 128,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "initializer_range": WIDE,
    }
    return GPT2Config(**{**settings, **more})


def qwen3_moe(**more: object) -> Qwen3MoeConfig:
    """A two-block Qwen3-MoE: four fused experts in the first block, a dense MLP in the second."""
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "initializer_range": WIDE,
    }
    return Qwen3MoeConfig(**{**settings, **more})


CONFIGS: dict[str, Callable[..., PretrainedConfig]] = {
    "llama": llama,
    "llama-tied": lambda **more: llama(tie_word_embeddings=True, **more),
    "gpt2": gpt2,
    "qwen3-moe": qwen3_moe,
}


def build_model(folder: Path, config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A seeded random model and a byte-level tokenizer, saved to `folder`; norms and biases are not trivial."""
    torch.manual_seed(7)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of the test vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # 97 printable characters and pieces of the text below
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>"], show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>").save_pretrained(folder)


TEXT = [
    f"The {a} {b} went to the {c} and found {n} {d}s there. It {v} them all, and then it rained."
    for n, (a, b, c, d, v) in enumerate(
        (a, b, c, d, v)
        for a in ("old", "small", "brave", "sleepy")
        for b in ("fox", "miller", "heron", "clock")
        for c in ("river", "market", "attic")
        for d in ("pebble", "lamp", "letter")
        for v in ("counted", "painted")
    )
]
