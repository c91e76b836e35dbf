"""What a recipe can do with a model: one class for each task, and for pruning two."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails

from llmshrink import patterns
from llmshrink.methods import load_method
from llmshrink.recipe.allocate import AllocateSpec
from llmshrink.recipe.cut import CutSpec
from llmshrink.recipe.distill import DistillStage
from llmshrink.recipe.gate import GateSpec
from llmshrink.recipe.inputs import InputSpec
from llmshrink.recipe.lora import LoraStage
from llmshrink.recipe.method import ExportSpec, FormatSpec, MethodSpec, OnIndivisible
from llmshrink.recipe.ratios import RankSpec, RatioSpec
from llmshrink.recipe.reconstruct import ReconstructSpec
from llmshrink.recipe.section import Section, fault, faults_of, refuse
from llmshrink.recipe.transform import TransformSpec
from llmshrink.recipe.tune import TuneSpec

DEFAULT_PRUNING = "sparsegpt"
DEFAULT_CLUSTERING = "kmeans"
DEFAULT_FACTORING = "svdllm"

Target = Literal["linears", "embedding", "head"]
Gate = Annotated[GateSpec, Field(description="what the result must keep to, else exit code 9")]


class MatrixStage(Section):
    """A stage that gives each matrix to a method."""

    task: str = Field(description="what this stage does")
    method: MethodSpec | None = None
    inputs: InputSpec | None = Field(
        None,
        description="round the inputs of linears to 8 bits too: int8, fp8, or a mapping; null: inputs stay as they are",
    )
    layers: dict[str, dict[str, Any] | None] = Field(
        default_factory=dict,
        description="regular expression over whole layer names -> the method's keys, or `inputs`, that differ there; "
        "null or `skip` leaves the layers as they are. `embedding` and `head` stand for these in any model. "
        "The last match wins; an expression that matches nothing is an error",
    )
    ignore: list[str] = Field(
        default_factory=list, description="regular expressions over whole layer names; these are left as they are"
    )
    transform: list[TransformSpec] = Field(
        default_factory=list,
        description="what rewrites weights before they are compressed and leaves the function as it is: a name, a "
        "mapping, or a list of them in their order; null: nothing",
    )
    allocate: AllocateSpec | None = Field(
        None,
        description="measure what each candidate costs in each layer, and choose those that together meet a size; "
        "null: layers get what `method` and `layers` say",
    )
    reconstruct: ReconstructSpec | None = Field(
        None,
        description="learn the codes and scales of each block, or its tables of values, or the weights a pruning kept, "
        "by gradient after the method, or {} with its defaults; null: they stay as the method chose them",
    )
    tune: TuneSpec | None = Field(
        None,
        description="tune scales, norms and biases through the whole model after that, towards the original's logits, "
        "or {} with its defaults; null: they stay",
    )
    format: FormatSpec | None = Field(
        None, description="checkpoint format; null: what the method is usually written as"
    )
    on_indivisible: OnIndivisible | None = Field(
        None,
        description="what to do with a layer that the group size does not divide: refuse, take a smaller group, "
        "skip the layer, or take one group for each output channel; null: refuse where the recipe names a group_size, "
        "else smaller_group",
    )
    gate: Gate = GateSpec()

    @property
    def aims(self) -> tuple[Target, ...]:
        """What is compressed of a model; of a GGUF file embedding and head are too, whatever this says."""
        return ("linears",)

    @property
    def indivisible(self) -> OnIndivisible:
        """`on_indivisible` with its default worked out."""
        typed = [self.method.settings if self.method else {}, *(keys or {} for keys in self.layers.values())]
        default: OnIndivisible = (
            "refuse" if any(keys.get("group_size") is not None for keys in typed) else "smaller_group"
        )
        return self.on_indivisible or default

    def method_for(self, layer: str, method: MethodSpec) -> MethodSpec | None:
        """The method of one layer; None leaves it as it is.

        Args:
            layer: the layer's name in the checkpoint, without `.weight`.
            method: the stage's method, or the one chosen for the model where the recipe leaves it out.
        """
        if any(patterns.matches(pattern, layer) for pattern in self.ignore):
            return None
        keys = self._keys_for(layer)
        return None if keys is None else method.override(_of_method(keys)) if keys else method

    def inputs_for(self, layer: str) -> InputSpec | None:
        """How the inputs of one layer, named as for `method_for`, are rounded."""
        keys = self._keys_for(layer) or {}
        if "inputs" not in keys:
            return self.inputs
        return None if keys["inputs"] is None else InputSpec.model_validate(keys["inputs"])

    def names(self, layer: str) -> bool:
        """Whether `layers` or `ignore` says what becomes of one layer."""
        return any(patterns.matches(pattern, layer) for pattern in (*self.layers, *self.ignore))

    def _keys_for(self, layer: str) -> dict[str, Any] | None:
        """What `layers` says of one layer: the last match; an empty mapping where nothing matches."""
        found = [keys for pattern, keys in self.layers.items() if patterns.matches(pattern, layer)]
        return found[-1] if found else {}

    @field_validator("transform", mode="before")
    @classmethod
    def _one_is_a_list(cls, given: Any) -> Any:
        return [] if given is None else given if isinstance(given, list) else [given]

    @field_validator("transform")
    @classmethod
    def _check_twice(cls, transform: list[TransformSpec]) -> list[TransformSpec]:
        names = [spec.name for spec in transform]
        if twice := [i for i, name in enumerate(names) if name in names[:i]]:
            raise refuse([fault((i,), f"'{names[i]}' is there already", names[i]) for i in twice])
        return transform

    @field_validator("layers", mode="before")
    @classmethod
    def _skip_is_null(cls, layers: Any) -> Any:
        return {k: None if v == "skip" else v for k, v in layers.items()} if isinstance(layers, dict) else layers

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, layers: dict[str, dict[str, Any] | None], info: ValidationInfo) -> Any:
        faults = _pattern_faults({p: (p,) for p in layers})
        for pattern, keys in layers.items():
            if keys is None or "method" not in info.data:  # a faulty method is told on its own line
                continue
            try:
                (info.data["method"] or MethodSpec()).override(_of_method(keys))
            except ValidationError as error:
                faults += faults_of(error, (), (pattern,))
            try:
                InputSpec.model_validate(keys.get("inputs") or "int8")
            except ValidationError as error:
                faults += faults_of(error, InputSpec.model_fields, (pattern, "inputs"))
        if faults:
            raise refuse(faults)
        return layers

    @field_validator("allocate")
    @classmethod
    def _check_candidates(cls, allocate: AllocateSpec | None, info: ValidationInfo) -> Any:
        faults: list[InitErrorDetails] = []
        for i, keys in enumerate((allocate and allocate.candidates) or []):
            try:
                (info.data.get("method") or MethodSpec()).override(keys)
            except ValidationError as error:
                faults += faults_of(error, (), ("candidates", i))
        if faults:
            raise refuse(faults)
        return allocate

    @model_validator(mode="after")
    def _check_task(self) -> Self:
        """Every method must be one of this stage's task."""
        named: list[tuple[tuple[str, ...], str | None]] = [
            (("method", "name"), self.method.name if self.method else None)
        ]
        named += [(("layers", p, "name"), keys.get("name")) for p, keys in self.layers.items() if keys]
        faults = []
        for at, name in named:
            if name is not None and (task := load_method(name).task) != self.task:
                faults.append(fault(at, f"'{name}' is a method of `llmshrink {task}`, not of {self.task}", name))
        if faults:
            raise refuse(faults)
        return self

    @field_validator("ignore")
    @classmethod
    def _check_ignore(cls, ignore: list[str]) -> list[str]:
        faults = _pattern_faults({p: (i,) for i, p in enumerate(ignore)})
        if faults:
            raise refuse(faults)
        return ignore


class QuantizeStage(MatrixStage):
    """Fewer bits for each weight."""

    task: Literal["quantize"] = Field(description="what this stage does")
    method: MethodSpec | None = Field(
        None,
        description="the algorithm and its settings; null: gptq with 4 bits, or nf4 where gptq cannot be read back; "
        "with inputs int8 gptq with 8 bits and one scale per output, with inputs fp8 fp8",
    )


class WeightStage(MatrixStage):
    """A stage for weights alone, with a usual method of its own."""

    usual: ClassVar[str]  # the method where none is named
    no_inputs: ClassVar[str]  # why inputs are not rounded

    @field_validator("method", mode="before")
    @classmethod
    def _name_it(cls, given: Any) -> Any:
        return {"name": cls.usual, **(given or {})} if given is None or isinstance(given, dict) else given

    @field_validator("inputs")
    @classmethod
    def _check_inputs(cls, inputs: InputSpec | None) -> InputSpec | None:
        if inputs is not None:
            raise refuse([fault((), cls.no_inputs, inputs)])
        return inputs


class PruneStage(WeightStage):
    """Fewer weights."""

    usual = DEFAULT_PRUNING
    no_inputs = "pruning rounds no inputs: quantize the result"

    task: Literal["prune"] = Field(description="what this stage does")
    method: MethodSpec = Field(
        default_factory=lambda: MethodSpec(name=DEFAULT_PRUNING),
        description="the algorithm and its settings; sparsegpt, which drops half of the weights, where it has no name",
    )
    ratios: RatioSpec | None = Field(
        None,
        description="find the sparsity of each layer that `layers` does not name before the pruning, the method's over "
        "all of them; null: each gets the method's",
    )

    @field_validator("format")
    @classmethod
    def _no_gguf(cls, spec: FormatSpec | None) -> FormatSpec | None:
        if spec is not None and spec.name == "gguf":
            raise refuse(
                [fault((), "a pruned model is not written as gguf: quantize the result, which keeps zeros", spec.name)]
            )
        return spec

    @model_validator(mode="after")
    def _check_ratios(self) -> Self:
        if self.ratios is None:
            return self
        faults, pattern = [], self.method.settings.get("pattern")
        if pattern is not None:
            faults.append(fault(("ratios",), f"the pattern {pattern} drops the same share everywhere", pattern))
        if self.allocate is not None:
            faults.append(fault(("ratios",), "`allocate` chooses the sparsities: leave out one or the other"))
        if self.ratios.name == "global" and self.method.name != "magnitude":
            message = f"one threshold for all matrices is for method magnitude: the scores of {self.method.name} differ"
            faults.append(fault(("ratios", "name"), f"{message} in scale from layer to layer", "global"))
        if faults:
            raise refuse(faults)
        return self


class TargetStage(WeightStage):
    """A stage whose formats can hold the table of tokens and the head too."""

    usual_format: ClassVar[str]  # where codes are to be packed and none is named

    targets: list[Target] = Field(
        ["linears"],
        min_length=1,
        description="what is compressed: the linears of blocks, the embedding, the head; where the head is tied to the "
        "embedding, either name means the one matrix. `layers` and `ignore` know these by their names too",
    )

    @property
    def aims(self) -> tuple[Target, ...]:
        """What is compressed of a model."""
        return tuple(self.targets)

    @field_validator("format", mode="before")
    @classmethod
    def _packed_is_usual(cls, given: Any) -> Any:
        alone = isinstance(given, dict) and given.get("pack") and given.get("type") is None
        return {"name": cls.usual_format, **given} if alone else given

    @field_validator("targets", mode="before")
    @classmethod
    def _one_target_is_a_list(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given

    @field_validator("targets")
    @classmethod
    def _check_targets(cls, targets: list[Target]) -> list[Target]:
        if twice := [i for i, name in enumerate(targets) if name in targets[:i]]:
            raise refuse([fault((i,), f"'{targets[i]}' is there already", targets[i]) for i in twice])
        return targets


class ClusterStage(TargetStage):
    """Few values, which many weights share."""

    usual, usual_format = DEFAULT_CLUSTERING, "codebook"
    no_inputs = "clustered weights meet inputs as they are: quantize to round these"

    task: Literal["cluster"] = Field(description="what this stage does")
    method: MethodSpec = Field(
        default_factory=lambda: MethodSpec(name=DEFAULT_CLUSTERING),
        description="the algorithm and its settings; kmeans with 4 bits, where it has no name",
    )


class FactorizeStage(TargetStage):
    """Products of thin matrices in place of matrices, alone or beside codes."""

    usual, usual_format = DEFAULT_FACTORING, "low-rank"
    no_inputs = "factored weights meet inputs as they are: quantize to round these"

    task: Literal["factorize"] = Field(description="what this stage does")
    method: MethodSpec = Field(
        default_factory=lambda: MethodSpec(name=DEFAULT_FACTORING),
        description="the algorithm and its settings; svdllm, which keeps 80 % of the numbers, where it has no name",
    )
    ratios: RankSpec | None = Field(
        None,
        description="find the rank of each layer that `layers` does not name, the method's `keep` over all of them; "
        "null: each keeps as much. Left out: spectrum (tie: similarity), unless the method says `rank` or `bits`, or "
        "`allocate` chooses",
    )

    @model_validator(mode="before")
    @classmethod
    def _find_ranks(cls, data: Any) -> Any:
        method = data.get("method") or {}
        said = isinstance(method, dict) and (method.get("rank") or method.get("bits"))
        if "ratios" in data or data.get("allocate") is not None or said:
            return data
        tied = isinstance(method, dict) and method.get("name") == "tie"
        return {**data, "ratios": {"name": "similarity"} if tied else {}}

    @model_validator(mode="after")
    def _check_ratios(self) -> Self:
        settings, tied = self.method.settings, self.method.name == "tie"
        if self.ratios is not None and tied != (self.ratios.name == "similarity"):
            wanted = "similarity" if tied else "spectrum"
            raise refuse([fault(("ratios", "name"), f"of {self.method.name} it is {wanted}", self.ratios.name)])
        if tied and self.ratios is None and not self.layers and "keep" in settings:
            message = "without `ratios` all that can be one is: leave out `keep`, or `ratios: null`"
            raise refuse([fault(("method", "keep"), message, settings["keep"])])
        said = next((key for key in ("rank", "bits") if settings.get(key) is not None), None)
        if self.ratios is not None and said is not None:
            raise refuse([fault(("ratios",), f"the method's `{said}` says the rank: leave out one or the other")])
        if self.allocate is not None and self.allocate.candidates is None and said is not None:
            message = f"the method's `{said}` leaves it nothing to choose: give it `candidates`"
            raise refuse([fault(("allocate",), message)])
        tried = [settings, *((self.allocate and self.allocate.candidates) or [])]
        if self.allocate is not None and (tied or any(keys.get("blocks", 1) != 1 for keys in tried)):
            message = "it measures one layer at a time, and `blocks` of them share a factor: leave out one or the other"
            raise refuse([fault(("allocate",), message)])
        if self.ratios is not None and self.allocate is not None:
            raise refuse([fault(("ratios",), "`allocate` chooses the ranks: leave out one or the other")])
        return self


class CutStage(Section):
    """Smaller tensors: whole neurons, heads, channels, experts or layers less."""

    task: Literal["prune"] = Field(description="what this stage does")
    cut: CutSpec = Field(description="what is kept, in place of a method that drops single weights")
    reconstruct: ReconstructSpec | None = Field(
        None,
        description="learn all linears of each block by gradient after that, or {} with its defaults; null: they stay",
    )
    gate: Gate = GateSpec()

    @model_validator(mode="before")
    @classmethod
    def _no_weights(cls, data: Any) -> Any:
        others = [key for key in data if key in PruneStage.model_fields.keys() - cls.model_fields.keys()]
        if others:
            message = "`cut` takes out whole parts, and this is for single weights: prune the result in a second run"
            raise refuse([fault((key,), message) for key in others])
        return data


class ExportStage(Section):
    """The codes that a model is stored in, written in another format."""

    task: Literal["export"] = Field(description="what this stage does")
    format: ExportSpec = Field(description="checkpoint format to write; dense: decoded weights")
    gate: Gate = GateSpec()


class EvalStage(Section):
    """Measure a model without changing it."""

    task: Literal["eval"] = Field(description="what this stage does")
    gate: Gate = GateSpec()


def _kind(stage: Any) -> Any:
    """The task of a stage, `cut` where a pruning takes out whole parts."""
    get = stage.get if isinstance(stage, dict) else partial(getattr, stage)
    task = get("task", None)
    return "cut" if task == "prune" and get("cut", None) is not None else task


Stage = Annotated[
    Annotated[QuantizeStage, Tag("quantize")]
    | Annotated[PruneStage, Tag("prune")]
    | Annotated[CutStage, Tag("cut")]
    | Annotated[ClusterStage, Tag("cluster")]
    | Annotated[FactorizeStage, Tag("factorize")]
    | Annotated[DistillStage, Tag("distill")]
    | Annotated[LoraStage, Tag("lora")]
    | Annotated[ExportStage, Tag("export")]
    | Annotated[EvalStage, Tag("eval")],
    Discriminator(_kind),
]


def _of_method(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if key != "inputs"}


def _pattern_faults(places: Mapping[str, tuple[str | int, ...]]) -> list[InitErrorDetails]:
    return [
        fault(at, f"not a regular expression: {why}", pattern)
        for pattern, at in places.items()
        if (why := patterns.fault(pattern)) is not None
    ]
