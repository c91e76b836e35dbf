"""The recipe as pydantic models: what to do, with which text, how measured. Unknown keys are refused.

Nothing here imports torch until a method's settings are validated, because the method itself describes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
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
from llmshrink.formats import format_names as format_names
from llmshrink.formats.gguf_mix import MIXES as MIXES
from llmshrink.methods import load_method
from llmshrink.methods import method_names as method_names
from llmshrink.recipe.allocate import AllocateSpec
from llmshrink.recipe.cut import CutSpec
from llmshrink.recipe.gate import GateSpec
from llmshrink.recipe.inputs import InputSpec
from llmshrink.recipe.ratios import RatioSpec
from llmshrink.recipe.reconstruct import ReconstructSpec
from llmshrink.recipe.section import Section, did_you_mean, fault, faults_of, refuse
from llmshrink.recipe.transform import TransformSpec
from llmshrink.recipe.tune import TuneSpec
from llmshrink.recipe.units import Bytes
from llmshrink.transforms import transform_names as transform_names

DEFAULT_METHOD = "gptq"  # whose settings `{bits: 3}` means; a plan takes another where the model needs it
DEFAULT_PRUNING = "sparsegpt"
DEFAULT_CLUSTERING = "kmeans"

OnIndivisible = Literal["refuse", "smaller_group", "skip", "channel"]
Gate = Annotated[GateSpec, Field(description="what the result must keep to, else exit code 9")]


class ModelSpec(Section):
    """Which model."""

    id: str | None = Field(None, min_length=1, description="Hub id or folder; null: the model inside llmshrink")
    revision: str | None = Field(None, min_length=1, description="branch, tag or commit on the Hub; null: main")


class MethodSpec(BaseModel):
    """A method's name beside that method's own settings: the keys that were typed, without defaults."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    name: str | None = Field(None, description="the algorithm; null: the default one for the model")

    @property
    def settings(self) -> dict[str, Any]:
        """The typed settings, without the name."""
        return dict(self.model_extra or {})

    def override(self, keys: Mapping[str, Any]) -> MethodSpec:
        """This method under a layer's own keys; another `name` starts from that method's defaults."""
        name = keys.get("name") or self.name
        kept = self.settings if name == self.name else {}
        return MethodSpec.model_validate({**kept, **keys, "name": name})

    def complete(self) -> dict[str, Any]:
        """Name and settings, with the defaults of a named method written out."""
        if self.name is None:
            return {"name": None, **self.settings}
        return {"name": self.name, **load_method(self.name).Config(**self.settings).model_dump(mode="json")}

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        name = self.name or DEFAULT_METHOD
        if name not in method_names():
            raise refuse([fault(("name",), f"there is no method '{name}'" + did_you_mean(name, method_names()), name)])
        config = load_method(name).Config
        try:
            config.model_validate(self.settings, strict=True)
        except ValidationError as error:
            raise refuse(faults_of(error, config.model_fields)) from None
        return self


class ExportSpec(Section):
    """How codes that are there are written."""

    name: str = Field(description="the checkpoint format")

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name not in format_names():
            message = f"there is no format '{name}'" + did_you_mean(name, format_names())
            raise refuse([fault((), message, name)])
        return name


class FormatSpec(ExportSpec):
    """How the result is written; a type alone means the format gguf."""

    type: str | None = Field(
        None, description="gguf: which mix of block types, e.g. Q4_K_M; null: the one that people mean by the bits"
    )

    @model_validator(mode="before")
    @classmethod
    def _type_is_gguf(cls, given: Any) -> Any:
        return {"name": "gguf", **given} if isinstance(given, dict) and given.get("type") is not None else given

    @field_validator("type")
    @classmethod
    def _check_type(cls, mix: str | None, info: ValidationInfo) -> str | None:
        mix = mix and mix.upper()
        if mix is not None and mix not in MIXES:
            raise refuse([fault((), f"there is no GGUF type '{mix}'" + did_you_mean(mix, list(MIXES)), mix)])
        if mix is not None and info.data.get("name", "gguf") != "gguf":
            raise refuse([fault((), f"types are for the format gguf, not for {info.data['name']}", mix)])
        return mix


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
        "null or `skip` leaves the layers as they are. The last match wins; an expression that matches nothing is an "
        "error",
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


class ClusterStage(WeightStage):
    """Few values, which many weights share."""

    usual = DEFAULT_CLUSTERING
    no_inputs = "clustered weights meet inputs as they are: quantize to round these"

    task: Literal["cluster"] = Field(description="what this stage does")
    method: MethodSpec = Field(
        default_factory=lambda: MethodSpec(name=DEFAULT_CLUSTERING),
        description="the algorithm and its settings; kmeans with 4 bits, where it has no name",
    )


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
    | Annotated[ExportStage, Tag("export")]
    | Annotated[EvalStage, Tag("eval")],
    Discriminator(_kind),
]


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


def _of_method(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if key != "inputs"}


def _pattern_faults(places: Mapping[str, tuple[str | int, ...]]) -> list[InitErrorDetails]:
    return [
        fault(at, f"not a regular expression: {why}", pattern)
        for pattern, at in places.items()
        if (why := patterns.fault(pattern)) is not None
    ]
