"""How a recipe has a teacher's words written down once, so that students learn without the teacher."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmshrink.recipe.section import Section


class CacheSpec(Section):
    """Of each position some tokens with their chances are kept, at the temperature of the loss."""

    method: Literal["sampled", "topk"] = Field(
        "sampled",
        description="sampled: the likeliest tokens and, drawn by their chances, others that stand for the rest: "
        "gradients are on average those of all tokens; topk: the likeliest alone, and the rest as one",
    )
    tokens: int | None = Field(
        None, ge=1, le=1 << 16, description="kept of each position; null: as many as 120 bytes hold"
    )
    folder: str | None = Field(
        None,
        min_length=1,
        description="where the cache lies, for other runs too: made if it is not there, else read; null: in the run's "
        "own folder of work, which goes when it ends",
    )
