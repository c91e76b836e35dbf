"""How little of a model learns: which kind of adapter, how large, and the settings that each kind works with."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from llmshrink.recipe.section import Section, fault, refuse

Adapter = Literal[
    "lora",
    "rslora",
    "dora",
    "qlora",
    "loftq",
    "adalora",
    "vera",
    "ia3",
    "prefix",
    "prompt",
    "p-tuning",
    "adapter",
    "full",
    "freeze",
]
Part = Literal["norms", "head", "embedding"]

LOW_RANK = {"rank": 16, "alpha": 32.0, "dropout": 0.0}
# What each kind takes, and what of it works where a recipe says nothing.
USUAL: dict[str, dict[str, Any]] = {
    "lora": LOW_RANK,
    "rslora": {"rank": 64, "alpha": 32.0, "dropout": 0.0},
    "dora": LOW_RANK,
    "qlora": LOW_RANK,
    "loftq": {**LOW_RANK, "iterations": 5},
    "adalora": {"rank": 8, "alpha": 32.0, "dropout": 0.0},
    "vera": {"rank": 256, "dropout": 0.0},
    "ia3": {},
    "prefix": {"tokens": 20, "text": None},
    "prompt": {"tokens": 20, "text": None},
    "p-tuning": {"tokens": 20, "width": 128},
    "adapter": {"width": 32, "placement": "pfeiffer"},
    "full": {},
    "freeze": {"blocks": 2, "parts": ["norms"]},
}
# The rate that each learns with. Those of soft prompts and of vectors are ten times those of matrices: with the rate
# of a matrix they stay where they began (the benchmark of peft: IA3 .31 -> .46, prompts .06 -> .34 of accuracy).
RATES: dict[str, float] = {
    "ia3": 5e-3,
    "vera": 5e-3,
    "prefix": 1e-2,
    "prompt": 3e-2,
    "p-tuning": 5e-3,
    "adalora": 2e-3,
    "full": 3e-4,
    "freeze": 1e-3,
}
RATE = 1e-3  # of all others
WRITES_MODEL = ("full", "freeze")  # what changes the model itself


class AdapterSpec(Section):
    """What learns."""

    name: Adapter = Field(
        "lora",
        description="lora: a product of two thin matrices beside each linear; rslora: that, scaled so that large ranks "
        "learn too; dora: that, and the length of each row apart; qlora: lora on the model in 4 bits (NF4); loftq: "
        "that, begun so that both together are near the model; adalora: ranks move to where they help; vera: two "
        "vectors around random matrices that all share; ia3: one factor for each output; prefix: keys and values "
        "before the text; prompt: embeddings before it; p-tuning: those, made by a small network; adapter: a narrow "
        "MLP behind each part of a block; full: all weights; freeze: the last blocks alone",
    )
    rank: int | None = Field(None, ge=1, description="of the products; 16 (rslora 64, adalora 8, vera 256)")
    alpha: float | None = Field(None, gt=0, description="the product counts alpha / rank times (rslora: over its root)")
    dropout: float | None = Field(None, ge=0, lt=1, description="share of the inputs of a product that is left out")
    iterations: int | None = Field(
        None, ge=1, description="of loftq: times that codes and product are fitted to each other; 5"
    )
    tokens: int | None = Field(None, ge=1, description="of prefix, prompt and p-tuning: how many stand before; 20")
    text: str | None = Field(
        None,
        min_length=1,
        description="of prefix and prompt: words that they begin as; null: tokens drawn from the vocabulary",
    )
    width: int | None = Field(None, ge=1, description="of the MLP of adapter (32), or of the network of p-tuning (128)")
    placement: Literal["pfeiffer", "houlsby"] | None = Field(
        None, description="of adapter: behind the MLP of each block, or behind its attention too; pfeiffer"
    )
    blocks: int | None = Field(None, ge=0, description="of freeze: how many of the last blocks learn; 2")
    parts: list[Part] | None = Field(None, description="of freeze: what else learns: norms, head, embedding; [norms]")

    @model_validator(mode="before")
    @classmethod
    def _with_usual(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"name": data}
        if not isinstance(data, dict) or data.get("name", "lora") not in USUAL:
            return data
        usual = USUAL[data.get("name", "lora")]
        return {**usual, **{key: value for key, value in data.items() if value is not None or key not in usual}}

    @model_validator(mode="after")
    def _check(self) -> Self:
        known = {"name", *USUAL[self.name]}
        told = [key for key in AdapterSpec.model_fields if getattr(self, key) is not None and key not in known]
        if told:
            takes = ", ".join(USUAL[self.name]) or "no settings"
            raise refuse([fault((key,), f"not of {self.name}, which takes {takes}") for key in told])
        if self.name == "freeze" and not self.blocks and not self.parts:
            raise refuse([fault(("blocks",), "nothing learns: name blocks or parts", self.blocks)])
        return self
