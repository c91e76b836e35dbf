"""How a model learns from another one."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from llmshrink.recipe.cut import CutSpec
from llmshrink.recipe.gate import GateSpec
from llmshrink.recipe.qat import QatSpec
from llmshrink.recipe.section import Section
from llmshrink.recipe.train import TrainSpec

QAT_RATE = 3e-5  # weights that are rounded move their codes: they learn slower

Divergence = Literal["kl", "reverse-kl", "jsd"]


class LossSpec(Section):
    """What is made small: how far the student's distribution is from the teacher's, and its surprise at the text."""

    name: Divergence = Field(
        "kl",
        description="kl: from teacher to student, which keeps all that the teacher finds likely; reverse-kl: from "
        "student to teacher, which drops what the student cannot say; jsd: between both, by `beta`",
    )
    beta: float = Field(0.5, gt=0, lt=1, description="of jsd: the teacher's share of the mixture")
    temperature: float = Field(
        2.0, gt=0, description="both distributions are softened by it; its square weighs the loss"
    )
    alpha: float = Field(0.5, ge=0, le=1, description="weight of that; the rest is cross entropy of the text")


class DistillStage(Section):
    """Train a smaller model towards what a larger one says."""

    task: Literal["distill"] = Field(description="what this stage does")
    teacher: str | None = Field(
        None, min_length=1, description="Hub id or folder; null: the model itself, before `student` cuts it"
    )
    student: CutSpec | None = Field(
        None, description="what of the model the student keeps, in the words of `cut`; null: all, the model is it"
    )
    qat: QatSpec | None = Field(
        None, description="round the student, and train it through the rounding, or {} with its defaults; null: floats"
    )
    loss: LossSpec = Field(default_factory=LossSpec, description="what is made small")
    train: TrainSpec = Field(default_factory=TrainSpec, description="how")
    gate: GateSpec = Field(GateSpec(), description="what the result must keep to, else exit code 9")

    @model_validator(mode="before")
    @classmethod
    def _slower(cls, data: Any) -> Any:
        train = (data.get("train") or {}) if isinstance(data, dict) and data.get("qat") is not None else None
        return {**data, "train": {"rate": QAT_RATE, **train}} if isinstance(train, dict) else data
