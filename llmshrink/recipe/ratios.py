"""How a recipe says that layers lose shares of their own, found before any of them does."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmshrink.recipe.section import Section

RatioName = Literal["owl", "global"]


class RankSpec(Section):
    """Find the rank of each layer's product; together they have the share of numbers that the method says."""

    name: Literal["spectrum", "similarity"] = Field(
        "spectrum",
        description="spectrum: by the singular values of each matrix, as the method weighs it: what every rank loses "
        "of it, solved for all together; a matrix that no rank suits stays as it is. similarity, of method tie: by "
        "what matrices lose that become one; those that lose least do",
    )


class RatioSpec(Section):
    """Find the sparsity of each layer; together they drop the share that the method says."""

    name: RatioName = Field(
        description="owl: blocks in which more weights stand out keep more, by a pass over the calibration text; "
        "global: each matrix drops what lies below one magnitude for all (method magnitude), no text"
    )
    threshold: float = Field(
        5.0,
        gt=0,
        description="owl: a weight stands out whose score is more than so many times the mean of its block's; the "
        "paper's 5 helps some models and harms others, for which 1.25 may help",
    )
    spread: float = Field(
        0.08, ge=0, lt=1, description="owl: the sparsities of any two blocks differ by twice this at most"
    )
