"""What stands before a text begins as tokens that the model knows: from random numbers it learns far less.

Prompts as embeddings of tokens (Lester et al. 2021, arXiv 2104.08691, section 3.2), prefixes as the keys and values
that the model itself finds for tokens (Li and Liang 2021, arXiv 2101.00190, section 4.3).
"""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor

from llmshrink.errors import PlanError


@torch.no_grad()
def begin(model: PeftModel, name: str, ids: Tensor) -> None:
    """Let a prompt or a prefix begin as these tokens [1, tokens].

    Raises:
        PlanError: keys and values of this family have another shape than peft holds.
    """
    weight = model.prompt_encoder["default"].embedding.weight
    base = model.get_base_model()
    ids = ids.to(weight.device)
    if name == "prompt":
        weight.copy_(base.get_input_embeddings()(ids)[0])
        return
    cache = base(input_ids=ids, use_cache=True).past_key_values
    pairs = [part for layer in cache.layers for part in (layer.keys, layer.values)]  # each [1, heads, tokens, size]
    flat = torch.cat([part[0].transpose(0, 1).flatten(1) for part in pairs], dim=1)
    if flat.shape != weight.shape:
        raise PlanError(
            f"Keys and values of {type(base).__name__} have another shape than peft holds for a prefix: "
            f"{flat.shape[1]} numbers for a token, and {weight.shape[1]}.",
            hint="Take --method prompt, or lora.",
        )
    weight.copy_(flat)
