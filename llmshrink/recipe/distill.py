"""How a model learns from another one."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from llmshrink.recipe.cache import CacheSpec
from llmshrink.recipe.cut import CutSpec
from llmshrink.recipe.gate import GateSpec
from llmshrink.recipe.lottery import LotterySpec
from llmshrink.recipe.modes import HiddenSpec, PolicySpec
from llmshrink.recipe.qat import QatSpec
from llmshrink.recipe.section import Section, fault, refuse
from llmshrink.recipe.train import TrainSpec

LOTTERY_ALPHA = 0.5  # whole, a model that teaches itself learns from the text alone
QAT_RATE = 3e-5  # weights that are rounded move their codes: they learn slower

Divergence = Literal["kl", "reverse-kl", "jsd", "uld"]


class LossSpec(Section):
    """What is made small: how far the student's distribution is from the teacher's, and its surprise at the text."""

    name: Divergence = Field(
        "kl",
        description="kl: from teacher to student, which keeps all that the teacher finds likely; reverse-kl: from "
        "student to teacher, which drops what the student cannot say; jsd: between both, by `beta`; uld: for a teacher "
        "that reads other tokens, where both end one at the same character",
    )
    shared: bool = Field(
        True,
        description="of uld: tokens that begin with the same piece of text are compared as one, and only the others in "
        "order of their size; false: all are",
    )
    beta: float = Field(0.5, gt=0, lt=1, description="of jsd: the teacher's share of the mixture")
    temperature: float = Field(
        2.0, gt=0, description="both distributions are softened by it; its square weighs the loss"
    )
    alpha: float = Field(1.0, ge=0, le=1, description="weight of that; the rest is cross entropy of the text")


class DistillStage(Section):
    """Train a smaller model towards what a larger one says."""

    task: Literal["distill"] = Field(description="what this stage does")
    teacher: str | None = Field(
        None, min_length=1, description="Hub id or folder; null: the model itself, before `student` cuts it"
    )
    student: CutSpec | None = Field(
        None, description="what of the model the student keeps, in the words of `cut`; null: all, the model is it"
    )
    lottery: LotterySpec | None = Field(
        None,
        description="or which single weights the student keeps, found by training and pruning in rounds: `train` says "
        "how long each training is; null: none goes",
    )
    qat: QatSpec | None = Field(
        None,
        description="round the student, and train it through the rounding, or {} with its defaults; null: floats",
    )
    loss: LossSpec = Field(default_factory=LossSpec, description="what is made small")
    cache: CacheSpec | None = Field(
        None,
        description="write down what the teacher says of the text, or {} with its defaults, and learn from that "
        "without it; null: it is asked at every step",
    )
    hidden: HiddenSpec | None = Field(
        None, description="draw states between layers to the teacher's too, or {} with its defaults; null: words alone"
    )
    policy: PolicySpec | None = Field(
        None,
        description="let the student go on with rows by itself and learn what its teacher finds of that, or {} with "
        "its defaults; null: text alone",
    )
    exits: list[int] | None = Field(
        None,
        description="layers, from 0, that learn to say what the last one says, so that those behind can be dropped "
        "later; without `teacher` and `student` nobody else teaches, and the last learns from the text; null: none",
    )
    train: TrainSpec = Field(default_factory=TrainSpec, description="how")
    gate: GateSpec = Field(GateSpec(), description="what the result must keep to, else exit code 9")

    @model_validator(mode="after")
    def _check_cache(self) -> Self:
        if self.cache is None:
            return self
        if self.loss.name != "kl":
            message = "a cache has some tokens of the teacher's, and this needs its chances of all: kl, or no `cache`"
            raise refuse([fault(("loss", "name"), message, self.loss.name)])
        for name in ("hidden", "policy"):
            if getattr(self, name) is not None:
                raise refuse([fault((name,), "it needs the teacher at every step: leave it or `cache` out")])
        if self.alone:
            raise refuse([fault(("cache",), "the last layer teaches the exits: name a teacher, or leave it out")])
        return self

    @property
    def alone(self) -> bool:
        """Whether the model has no teacher but its own last layer."""
        return (
            bool(self.exits)
            and self.teacher is None
            and self.student is None
            and self.lottery is None
            and self.qat is None
        )

    @field_validator("exits")
    @classmethod
    def _check_exits(cls, layers: list[int] | None) -> list[int] | None:
        if layers is not None and (not layers or min(layers) < 0 or len(set(layers)) < len(layers)):
            raise refuse([fault((), "a list of exits names each layer once, from 0", layers)])
        return layers and sorted(layers)

    @model_validator(mode="after")
    def _check_alone(self) -> Self:
        for name in ("hidden", "policy"):
            if self.alone and getattr(self, name) is not None:
                raise refuse([fault((name,), "nobody but the last layer teaches: name a teacher, or leave it out")])
        return self

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.student is not None and self.lottery is not None:
            message = "`student` cuts parts out and this drops single weights: cut first, and give this the result"
            raise refuse([fault(("lottery",), message)])
        if self.lottery is not None and self.teacher is None and self.loss.alpha == 1:
            message = "the first training is of the whole model, its own teacher: give alpha below 1, or a teacher"
            raise refuse([fault(("loss", "alpha"), message, self.loss.alpha)])
        if self.qat is not None and self.lottery is not None:
            raise refuse([fault(("lottery",), "draw first, and train the result through rounding: leave one out")])
        return self

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        train, loss = data.get("train") or {}, data.get("loss") or {}
        if data.get("qat") is not None and isinstance(train, dict):
            data = {**data, "train": {"rate": QAT_RATE, **train}}
        if data.get("lottery") is not None and data.get("teacher") is None and isinstance(loss, dict):
            data = {**data, "loss": {"alpha": LOTTERY_ALPHA, **loss}}
        return data
