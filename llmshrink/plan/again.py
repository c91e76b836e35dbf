"""Quantized models that learned by an adapter, and are quantized again as they were: the stage that does that."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from llmshrink.errors import PlanError
from llmshrink.forms import Quantized, Scheme
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.zeros import matrices_of
from llmshrink.recipe.stages import QuantizeStage

AGAIN = "`llmshrink export --to dense` writes it without codes; adapt that, and compress the result."


def as_quantized(model: StreamedModel) -> QuantizeStage | None:
    """The stage that quantizes a model as this one is, but for the codes, which are found anew; None: it is not.

    Raises:
        PlanError: no method here makes codes like these.
    """
    stored = model.weights.format.name
    if stored == "dense":
        return None
    found = _bnb(model) if stored == "bnb" else _grid(model)
    return QuantizeStage.model_validate({"task": "quantize", **found})


def _bnb(model: StreamedModel) -> dict[str, Any]:
    said = model.source.quantization or {}
    if not (said.get("load_in_4bit") or said.get("_load_in_4bit")):
        return {"method": {"name": "int8-bnb"}}
    name, double = said.get("bnb_4bit_quant_type", "fp4"), bool(said.get("bnb_4bit_use_double_quant"))
    return {"method": {"name": name, "block_size": 64, "double_quant": double}}


def _grid(model: StreamedModel) -> dict[str, Any]:
    """GPTQ on the very grid of each matrix; those that are not stored in codes are left alone."""
    matrices = matrices_of(model)
    schemes = {m.name: _scheme(model, m.key) for m in matrices if m.key in model.weights.compressed}
    ((usual, _),) = Counter(schemes.values()).most_common(1)
    others = {f"{re.escape(name)}": _keys(scheme) for name, scheme in schemes.items() if scheme != usual}
    return {
        "method": {"name": "gptq", **_keys(usual)},
        "layers": others,
        "ignore": [re.escape(m.name) for m in matrices if m.name not in schemes],
        "format": {"name": model.weights.format.name},
    }


def _scheme(model: StreamedModel, key: str) -> Scheme:
    form = model.weights.form(key)
    found = form.scheme if isinstance(form, Quantized) else None
    if found is None or found.kind != "int" or found.whole or model.weights.input(key) is not None:
        raise PlanError(
            f"{model.source.id}: {key} is stored as {model.weights.format.name} in a way that no adapter can be merged "
            "into.",
            hint=f"Leave out --merge; or {AGAIN[0].lower()}{AGAIN[1:]}",
        )
    return found


def _keys(scheme: Scheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": scheme.group_size or -1, "symmetric": scheme.symmetric}
