"""How a recipe says what of a model is cut out, so that its tensors are smaller."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from llmshrink.recipe.section import Section, fault, refuse
from llmshrink.recipe.units import Amount, SizeLimit

Criterion = Literal["obs", "wanda", "activation", "fluctuation", "taylor", "magnitude"]
LayerCriterion = Literal["search", "divergence", "influence", "angular"]
WIDTHS = ("neurons", "heads", "hidden", "experts")


class CutSpec(Section):
    """Whole neurons, heads, channels, experts or layers are taken out; every size says what is kept."""

    neurons: Amount | None = Field(
        None, description="inner channels of each MLP that are kept: a number, or 75%; null: all"
    )
    heads: Amount | None = Field(
        None, description="attention heads of each layer that are kept, whole groups with one key and value; null: all"
    )
    hidden: Amount | None = Field(
        None, description="channels of the states between layers that are kept, the same everywhere; null: all"
    )
    experts: Amount | None = Field(
        None,
        description="experts of each layer that are kept: those that add most to the tokens they get (REAP); null: all",
    )
    layers: Amount | list[int] | None = Field(
        None, description="layers that are kept: how many, 75%, or a list of their numbers; null: all"
    )
    params: Amount | None = Field(
        None, description="or how many parameters are kept, e.g. 80%: what to cut for that is found by measuring"
    )
    size: SizeLimit | None = Field(
        None, description="or the largest size of the files that hold tensors: 3.5GiB, or 80% of the original's"
    )
    criterion: Criterion = Field(
        "obs",
        description="what a neuron or a head is worth: obs, the error that is left without it once the others make up "
        "for it; wanda, activation norm times weight norm; activation, its norm alone; fluctuation, its variance times "
        "the weight norm; taylor, the change to first order of the loss without it, by gradients on `rows`; magnitude "
        "of weights, which looks at no text",
    )
    layer_criterion: LayerCriterion = Field(
        "search",
        description="which layers go where only their number is given: by the divergence without each, by how little "
        "each changes its input (influence), or a stretch of them (angular); search tries what these say, and one "
        "after another by divergence, and takes the best",
    )
    repair: bool = Field(
        True,
        description="fit what writes to the states between layers, by least squares, to make up for what is gone; "
        "false: what is left stays as it was",
    )
    damp: float | None = Field(
        None,
        gt=0,
        description="how strongly fitted weights are held to what they were, as a share of the mean square of what "
        "they are multiplied by; null: what helps most on rows that are held back, or no fit where none does",
    )
    round_to: int | None = Field(
        None,
        ge=1,
        description="widths from shares and targets are multiples of this; null: 256, or less in small models",
    )
    rows: int = Field(
        16, ge=1, description="calibration rows on which candidates and layers are compared; as many others fit them"
    )

    @property
    def aimed(self) -> bool:
        """Whether it says how large the result may be, and not what is cut."""
        return self.params is not None or self.size is not None

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, layers: Amount | list[int] | None) -> Amount | list[int] | None:
        if isinstance(layers, list):
            if not layers or min(layers) < 0 or len(set(layers)) < len(layers):
                raise refuse([fault((), "a list of layers names each that is kept once, from 0", layers)])
            return sorted(layers)
        return layers

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.params is not None and self.size is not None:
            raise refuse([fault(("size",), "the parameters say it already: leave out one or the other", self.size)])
        if not self.aimed and all(getattr(self, name) is None for name in (*WIDTHS, "layers")):
            raise refuse([fault((), "say what is kept: neurons, heads, hidden, experts, layers, params or size")])
        return self
