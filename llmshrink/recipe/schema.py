"""The recipe as pydantic models: what to do, with which text, how measured. Unknown keys are refused.

Nothing here imports torch until a method's settings are validated, because the method itself describes them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
)

from llmshrink.recipe.section import Section
from llmshrink.recipe.stages import Stage
from llmshrink.recipe.units import Bytes


class ModelSpec(Section):
    """Which model."""

    id: str | None = Field(None, min_length=1, description="Hub id or folder; null: the model inside llmshrink")
    revision: str | None = Field(None, min_length=1, description="branch, tag or commit on the Hub; null: main")


class CalibrationSpec(Section):
    """The text that methods look at while they compress."""

    data: str = Field(
        "auto",
        min_length=1,
        description="auto, generator (the built-in stories), self (sampled from the model), a .txt, .json, .jsonl or "
        ".parquet file, or a dataset id on the Hub",
    )
    split: str | None = Field(None, min_length=1, description="split of a Hub dataset; null: train")
    column: str | None = Field(None, min_length=1, description="the column or key that holds the text; null: found")
    samples: int = Field(128, ge=1, description="rows of tokens")
    length: int | None = Field(None, ge=2, description="tokens in a row; null: 2048, or the model's positions if fewer")
    seed: int = Field(0, ge=0, description="which rows are drawn")
    packed: bool = Field(True, description="fill rows with documents end to end; false: one document in each row")


class EvaluationSpec(Section):
    """The text on which the model before and after is compared, and whether speed is measured."""

    data: list[str] = Field(
        default=["auto"], description="texts, each named as calibration.data; an empty list measures no quality"
    )
    baseline: str | None = Field(
        None, min_length=1, description="for eval: Hub id or folder of a model to compare with, by KL to it"
    )
    split: str | None = Field(None, min_length=1, description="split of a Hub dataset; null: test")
    column: str | None = Field(None, min_length=1, description="the column or key that holds the text; null: found")
    rows: int = Field(64, ge=1, description="rows of tokens from each text")
    length: int | None = Field(None, ge=2, description="tokens in a row; null: 2048, or the model's positions if fewer")
    packed: bool = Field(True, description="fill rows with documents end to end; false: one document in each row")
    speed: bool = Field(True, description="load the model in a process of its own and time load, prefill and decode")


class RunSpec(Section):
    """How a run works, apart from what it makes."""

    device: str = Field("auto", min_length=1, description="auto, cpu, cuda or cuda:N")
    threads: int | None = Field(None, ge=1, description="CPU threads; null: as many as torch takes")
    memory: Bytes | None = Field(
        None,
        description="what the run may hold in memory, its libraries (about 0.3 GiB) counted, e.g. 6GiB: hidden states "
        "go to disk, batches get smaller, statistics are gathered in several passes; null: what is available, without "
        "smaller batches",
    )
    sequential: Literal["block", "subset"] = Field(
        "block",
        description="when later layers see compressed inputs: after each block, or within it too (q,k,v, then o, then "
        "gate,up, then down: slower)",
    )
    resume: bool = Field(True, description="go on with an interrupted run of the same recipe")
    keep: bool = Field(False, description="of several stages: keep what those before the last wrote, beside the output")
    strict: bool = Field(False, description="exit 9 where an event says that something was degraded")
    batch_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens in one forward pass, at least a row; null: up to 1024, fewer where layers are wide",
    )


class Recipe(Section):
    """Everything a run needs to know."""

    version: Literal[1] = Field(description="version of the recipe's language")
    model: ModelSpec = Field(default_factory=ModelSpec, description="which model")
    stages: list[Stage] = Field(min_length=1, description="what to do, in this order")
    calibration: CalibrationSpec = Field(default_factory=CalibrationSpec, description="text for the methods")
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec, description="text and measures for comparison")
    run: RunSpec = Field(default_factory=RunSpec, description="how, kept apart from what")
    output: str | None = Field(
        None,
        min_length=1,
        description="folder of the result; null: out/<model>-<method><bits>, out/<model>-<type> as GGUF, or "
        "out/<model>-<format> of an export",
    )
