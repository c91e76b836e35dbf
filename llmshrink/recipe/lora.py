"""How a model learns from text by few weights, or by all."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from llmshrink import patterns
from llmshrink.recipe.adapter import RATE, RATES, WRITES_MODEL, AdapterSpec
from llmshrink.recipe.gate import GateSpec
from llmshrink.recipe.section import Section, fault, refuse
from llmshrink.recipe.train import TrainSpec


class LoraStage(Section):
    """Learn from text, by an adapter beside the weights or in them."""

    task: Literal["lora"] = Field(description="what this stage does")
    method: AdapterSpec = Field(default_factory=AdapterSpec, description="what learns")
    target: list[str] = Field(
        ["auto"],
        min_length=1,
        description="which linears get an adapter: ends of their names (q_proj) or regular expressions over whole "
        "names; auto: all linears of all blocks",
    )
    label: str | None = Field(
        None,
        min_length=1,
        description="the column or key of the class of each row: learn to tell classes apart; null: learn the text",
    )
    merge: bool = Field(
        False,
        description="write a whole model with the adapter in its weights: zeros of a pruned model stay, a quantized "
        "one is quantized again as it was; false: an adapter folder that peft loads",
    )
    anchor: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the loss that is how far the model has gone, KL(without adapter || with it), from what "
        "it said before: so it forgets less; 0: the text is all that counts",
    )
    train: TrainSpec = Field(default_factory=TrainSpec, description="how")
    gate: GateSpec = Field(GateSpec(), description="what the result must keep to, else exit code 9")

    @property
    def writes_model(self) -> bool:
        """Whether a whole model comes out."""
        return self.merge or self.method.name in WRITES_MODEL

    @model_validator(mode="before")
    @classmethod
    def _usual_rate(cls, data: Any) -> Any:
        method, train = data.get("method") or {}, data.get("train") or {}
        name = method if isinstance(method, str) else method.get("name", "lora") if isinstance(method, dict) else ""
        if not isinstance(train, dict):
            return data
        return {**data, "train": {"rate": RATES.get(name, RATE), **train}}

    @field_validator("target", mode="before")
    @classmethod
    def _one_is_a_list(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given

    @field_validator("target")
    @classmethod
    def _check_target(cls, target: list[str]) -> list[str]:
        faults = [
            fault((i,), f"neither a name nor a regular expression: {why}", pattern)
            for i, pattern in enumerate(target)
            if (why := patterns.fault(pattern)) is not None
        ]
        if "auto" in target and len(target) > 1:
            faults.append(fault((), "auto means all linears: name them, or leave it at auto", target))
        if faults:
            raise refuse(faults)
        return target

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        name = self.method.name
        if self.target != ["auto"] and name in ("prefix", "prompt", "p-tuning", "adapter", *WRITES_MODEL):
            raise refuse([fault(("target",), f"{name} chooses no linears", self.target)])
        beside_linears = name not in ("prefix", "prompt", "p-tuning", "adapter", "qlora", "loftq", *WRITES_MODEL)
        if self.label is not None and (self.merge or not beside_linears):
            what = "`merge`" if self.merge else name
            message = f"classes are learned by an adapter beside linears and a head of its own, not by {what}"
            raise refuse([fault(("label",), message, self.label)])
        if self.label is not None and self.gate.quality:
            raise refuse([fault(("gate",), f"{self.gate.quality[0]} is asked of text, and here rows have classes")])
        if self.anchor and (name in WRITES_MODEL or self.label is not None):
            why = "classes say nothing about words" if self.label is not None else f"{name} leaves no model as it was"
            raise refuse([fault(("anchor",), f"what was said before is not known: {why}", self.anchor)])
        if self.merge and name in ("prefix", "prompt", "p-tuning", "adapter"):
            raise refuse([fault(("merge",), f"no weights say what {name} does: it stays an adapter", self.merge)])
        return self
