"""GGUF files made of models, and what the models themselves compute with the same weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmshrink.gguf.blueprint import Blueprint, draw
from llmshrink.gguf.checkpoint import SINGLE
from llmshrink.io.ggml import DTYPES
from llmshrink.model.source import open_source

# Where the tiny models of tiny.py are not what llama.cpp takes for granted.
CHANGES: dict[str, dict[str, object]] = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16},
}
FAMILIES = ("llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2")


def shards(source: Path, type: str = "F32") -> dict[str, Tensor]:
    """The tensors of a checkpoint by key, those of the blocks' matrices cast to a type of torch, unless it is F32."""
    checkpoint = open_source(str(source)).checkpoint
    return dict(_cast(key, checkpoint.get(key), type) for key in checkpoint.infos)


def _cast(key: str, tensor: Tensor, type: str) -> tuple[str, Tensor]:
    if type == "F32" or tensor.ndim != 2 or not any(part.isdigit() for part in key.split(".")):
        return key, tensor
    stored = tensor.T.contiguous() if ".c_" in key else tensor  # Conv1D
    return f"{key}.{type}", stored.to(DTYPES[type])


def plan(source: Path, tensors: dict[str, Tensor], type: str = "F32") -> Blueprint:
    found = open_source(str(source))
    meta = {key: tensor.to("meta") for key, tensor in tensors.items()}
    return draw(found.config, found.tokenizer, meta, type=type, name="tiny", licence="apache-2.0")


def write(source: Path, folder: Path, type: str = "F32") -> Path:
    """A folder with the GGUF file of a model beside its configuration and tokenizer."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = shards(source, type)
    plan(source, tensors, type).write(folder / SINGLE, tensors.__getitem__)
    return folder / SINGLE


@torch.no_grad()
def rounded(source: Path, type: str = "F32") -> PreTrainedModel:
    """The model in float32, with its blocks' matrices rounded to a type of torch."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and any(part.isdigit() for part in name.split(".")):
            parameter.copy_(parameter.to(DTYPES[type]))
    return model
