"""Rotary positions in llama.cpp's words: numbers in the metadata, and divisors of the frequencies as tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmshrink.errors import PlanError
from llmshrink.io.gguf import Value

Result = tuple[dict[str, Value], dict[str, Tensor]]
CLOSE = 1e-6  # of factors that are computed in two ways


def rope(config: PretrainedConfig, architecture: str, head: int) -> Result:
    """Settings without the architecture's name before them, and float32 tensors [n] by their names in the file.

    Args:
        config: of the model.
        architecture: llama.cpp's name.
        head: values of a head.

    Raises:
        PlanError: positions that llama.cpp cannot compute.
    """
    by_layer = "full_attention" in config.rope_parameters
    found: dict[str, Any] = config.rope_parameters["full_attention"] if by_layer else config.rope_parameters
    rotated = int(head * (found.get("partial_rotary_factor") or 1.0))
    if rotated != head and architecture != "phi3":
        raise PlanError(f"llama.cpp rotates whole heads of {architecture}, and this model {rotated} of {head} values.")
    values: dict[str, Value] = {"rope.dimension_count": rotated, "rope.freq_base": float(found["rope_theta"])}
    if by_layer:
        local = config.rope_parameters["sliding_attention"]
        if local["rope_type"] != "default":
            raise PlanError("llama.cpp scales no positions of blocks with a sliding window.")
        values["rope.freq_base_swa"] = float(local["rope_theta"])
    kind = found["rope_type"]
    if kind == "default":
        return values, {}
    if kind == "linear":
        return values | {"rope.scaling.type": "linear", "rope.scaling.factor": float(found["factor"])}, {}
    if kind == "yarn" and not by_layer:
        return values | _yarn(config, found), {}
    if kind == "llama3" and architecture == "llama":
        return values, {"rope_freqs.weight": _llama3(config, found, head)}
    if kind == "longrope" and architecture == "phi3":
        settings, tensors = _longrope(config, found)
        return values | settings, tensors
    raise PlanError(f"llama.cpp has no positions of the kind {kind!r} for {architecture}.")


def _yarn(config: PretrainedConfig, found: dict[str, Any]) -> dict[str, Value]:
    """YaRN (Peng et al. 2023, section 3.4), whose temperature llama.cpp computes by itself."""
    _, temperature = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    original = int(found["original_max_position_embeddings"])
    factor = float(found.get("factor") or config.max_position_embeddings / original)
    own = 0.1 * math.log(factor) + 1.0
    if abs(temperature - own) > CLOSE or not found.get("truncate", True):
        raise PlanError(f"llama.cpp computes YaRN with the factor {own:.6g} for attention, and this model otherwise.")
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": original,
        "rope.scaling.yarn_beta_fast": float(found.get("beta_fast") or 32.0),
        "rope.scaling.yarn_beta_slow": float(found.get("beta_slow") or 1.0),
    }


def _llama3(config: PretrainedConfig, found: dict[str, Any], head: int) -> Tensor:
    """What each frequency is divided by (Llama 3.1): the plain one over the one that transformers uses."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / found["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float32) / head)
    divisors: Tensor = plain / scaled
    return divisors


def _longrope(config: PretrainedConfig, found: dict[str, Any]) -> Result:
    """Divisors for texts within and beyond the original context (LongRoPE, Ding et al. 2024)."""
    _, factor = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu")
    tensors = {f"rope_factors_{name}.weight": torch.tensor(found[f"{name}_factor"]) for name in ("long", "short")}
    return {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": int(found["original_max_position_embeddings"]),
        "rope.scaling.attn_factor": float(factor),
    }, tensors
