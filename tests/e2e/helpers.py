"""Recipes for tests, and the dense model behind an output as llmshrink decodes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.recipe.load import validate
from llmshrink.recipe.schema import Recipe


def recipe(model: Path, output: Path, text: Path, method: dict[str, Any] | None = None, **more: Any) -> Recipe:
    """A small quantize recipe without evaluation."""
    stage: dict[str, Any] = {"task": "quantize", "method": method, **more.pop("stage", {})}
    data: dict[str, Any] = {
        "version": 1,
        "model": {"id": str(model)},
        "stages": [stage],
        "calibration": {"data": str(text), "samples": 12, "length": 48},
        "evaluation": {"data": [], "speed": False},
        "run": {"threads": 2, "batch_tokens": 192},
        "output": str(output),
    }
    for section, values in more.items():
        data[section] = {**data.get(section, {}), **values}
    return validate(data)


def decoded_model(folder: Path, original: Path) -> PreTrainedModel:
    """The original's class with the weights that llmshrink decodes from `folder`, float32."""
    streamed = StreamedModel(open_source(str(folder)), torch.device("cpu"))
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    state = {
        name: streamed.map.build(name, lambda key: streamed.weights.get(key).float()) for name in streamed.map.origins
    }
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model


def logits(model: PreTrainedModel, vocabulary: int = 160) -> torch.Tensor:
    """Logits for three fixed rows."""
    ids = torch.randint(0, vocabulary, (3, 32), generator=torch.Generator().manual_seed(11))
    with torch.no_grad():
        return model(ids).logits.float()
