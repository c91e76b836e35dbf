"""How a model is trained: on what, how long, how fast, and what is kept on the way."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmshrink.recipe.section import Section
from llmshrink.recipe.units import Share

Optimizer = Literal["adamw", "adamw-8bit", "paged-adamw-8bit", "adafactor", "sgd"]

Tracker = Literal[
    "azure_ml",
    "clearml",
    "codecarbon",
    "comet_ml",
    "dagshub",
    "dvclive",
    "flyte",
    "mlflow",
    "neptune",
    "swanlab",
    "tensorboard",
    "trackio",
    "wandb",
]


class TrainSpec(Section):
    """Steps of gradient on text; whichever of the limits is met first ends them."""

    data: str = Field("auto", min_length=1, description="text to train on, named as calibration.data; auto: as there")
    split: str | None = Field(None, min_length=1, description="split of a Hub dataset; null: train")
    column: str | None = Field(None, min_length=1, description="the column or key that holds the text; null: found")
    kind: Literal["auto", "text", "prompt", "chat"] = Field(
        "auto",
        description="what its entries are. text; prompt: `prompt` and `completion` (or `question` and `answer`, or "
        "`instruction`, `input` and `output`, each on lines of its own); chat: `messages`, each with `role` and "
        "`content`, laid out by the tokenizer's chat template; auto: by the keys of the first entry",
    )
    answers_only: bool = Field(
        True, description="of prompt and chat: the loss is taken on what answers; false: on all of the text"
    )
    packing: bool = Field(
        True,
        description="fill rows, of text end to end, of prompt and chat with as many whole entries as fit; later "
        "ones see those before. false: each entry in a row of its own, padded in batches",
    )
    length: int | None = Field(None, ge=2, description="tokens in a row; null: 512, or the model's positions if fewer")
    batch: int = Field(4, ge=1, description="rows in a forward pass on each device")
    accumulate: int = Field(1, ge=1, description="forward passes whose gradients make one step")
    epochs: float = Field(1.0, gt=0, description="times that each row is seen, where no limit says otherwise")
    max_steps: int | None = Field(None, ge=1, description="steps of gradient at most")
    max_tokens: int | None = Field(None, ge=1, description="tokens at most, seen again or not; epochs follow from it")
    max_minutes: float | None = Field(None, gt=0, description="minutes at most; the rate falls as if all were done")
    rate: float = Field(1e-3, gt=0, lt=1, description="of learning, at its highest")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="how the rate falls to its end")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the rate rises to its highest")
    weight_decay: float = Field(0.0, ge=0, lt=1, description="of AdamW")
    clip: float = Field(1.0, gt=0, description="norm that gradients are cut to")
    hold: Share = Field(0.05, description="share of the rows that is not trained on and measures how it goes")
    evaluations: int = Field(4, ge=0, description="times that the rows held back are measured on the way")
    patience: int | None = Field(
        None, ge=1, description="stop after as many of these in a row without a gain, and keep the best; null: go on"
    )
    save_minutes: float = Field(5.0, gt=0, description="minutes between two states that a killed run goes on from")
    optimizer: Optimizer = Field(
        "adamw",
        description="adamw: two float32 values for each weight that learns; adamw-8bit: the same in a byte each "
        "(bitsandbytes); paged-adamw-8bit: that, moved out of a GPU that is full; adafactor: sums of rows and columns; "
        "sgd: nothing",
    )
    checkpointing: bool = Field(
        False,
        description="keep only what enters each block and make the rest twice: less memory, a third slower",
    )
    report_to: list[Tracker] = Field(
        default=[],
        description="trackers that are told of losses as they come: tensorboard (into runs/, or "
        "TENSORBOARD_LOGGING_DIR), wandb, mlflow, trackio and others of transformers; each is set up in its own way",
    )
    keep_zeros: Literal["auto"] | bool = Field(
        "auto",
        description="zeros of pruned matrices stay zero while the other weights learn: auto, in matrices of blocks of "
        "which a share is zero that is no accident (5 %); true, any zero of these; false, none",
    )
    seed: int = Field(
        0,
        ge=0,
        description="of the order of entries, over all of the text (a Hub dataset of more than 1 GiB is streamed, and "
        "10,000 entries at a time are mixed), of that of rows, and of all that is drawn",
    )


__all__ = ["TrainSpec"]
