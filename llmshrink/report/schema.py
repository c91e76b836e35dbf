"""The report of a run: a versioned, frozen model of everything that was decided, done and measured.

`Report.model_dump_json()` is `report.json`; `Report.model_json_schema()` describes it. A number that was not measured
is None, never zero. Sizes are bytes, times are seconds, rates are tokens per second, divergences are nats per token.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

BY_RULE = "by rule (not run)"

Support = Literal["native", "plugin", "dense-only", "no"]


class Record(BaseModel):
    """Base of every part: frozen, unknown keys refused, no NaN; also read from an object's attributes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, from_attributes=True)


class Check(Record):
    """One thing that was verified, with the number that decided it where there is one."""

    name: str
    passed: bool | None = Field(description="None: it could not be run here; the detail says why")
    detail: str = ""
    value: float | None = None


class GateReport(Record):
    """One gate of a stage: what the recipe asks for beside what was measured."""

    name: str = Field(description="its key in the recipe")
    limit: float = Field(description="shares as fractions, KL in nats, sizes in bytes")
    value: float | None = Field(description="the worst of all texts; None: not measured, which fails")
    passed: bool
    detail: str = Field(default="", description="on which text, or why there is no value")


class EventRecord(Record):
    """Something that a run did differently from what its recipe says, or that its reader should know."""

    kind: str
    message: str
    layer: str | None = None
    data: dict[str, float] | None = None
    stage: int | None = Field(default=None, description="which of several it was in, from 1; None: there is one")


class LayerReport(Record):
    """What became of one matrix [out, in] of the checkpoint."""

    name: str
    shape: tuple[int, ...]
    method: str | None = Field(description="None: left as it is")
    form: str = Field(description="the form's name: Dense, Quantized, ...")
    format: str
    bits: int | None = None
    group_size: int | None = Field(default=None, description="weights that share a scale; None: one per channel")
    rank: int | None = Field(default=None, description="of the product that it is, or that codes are added to")
    shares: str | None = Field(
        default=None, description="layer beside which the right factor is stored, where several have it in common"
    )
    type: str | None = Field(default=None, description="what the format calls it: a block type of GGUF")
    inputs: str | None = Field(default=None, description="how its inputs are rounded; None: they are not")
    parameters: int
    bytes_before: int
    bytes_after: int
    bits_per_weight: float = Field(description="scales and zero points counted")
    relative_error: float | None = Field(default=None, description="||W - Q|| / ||W||, Frobenius")
    zeros: int | None = Field(default=None, description="weights that are zero in what is written")
    objective: float | None = Field(
        default=None,
        description="the error that the method minimises over that of rounding on the same grid; below 1 is better",
    )
    reconstructed: bool = Field(default=False, description="it was learned, or fitted, with the whole block")
    seconds: float | None = None
    fallback: bool = Field(default=False, description="done by the method's fallback; an event says why")
    reason: str | None = Field(default=None, description="why it was left as it is")


class BlockReport(Record):
    """What learning the codes of a block together gained on calibration text, or fitting what was left of it."""

    block: int
    error_before: float = Field(description="mean squared difference to the output of the original's block")
    error_after: float = Field(description="the same of what was written")
    codes_changed: float | None = Field(
        default=None, description="share of the codes learned that are others than the method's; None: no codes were"
    )


class TransformReport(Record):
    """What a transform did to a block before it was compressed."""

    block: int
    name: str
    difference: float = Field(
        description="by how much all transforms together changed what the block adds to its input, as a share of it"
    )
    error_left: float | None = Field(
        default=None,
        description="share of the squared output error of rounding that is left, on average over what it scaled; None: "
        "it did not look at that",
    )


class UnitReport(Record):
    """Layers that get the same candidate, and what was measured of each that they can get."""

    layers: str
    candidates: list[int] = Field(description="positions in the list of candidates")
    bytes: list[int] = Field(description="with each of them")
    scores: list[float] = Field(description="what each costs; empty: not measured")
    chosen: int | None = Field(default=None, description="position in the list of candidates")


class AllocationReport(Record):
    """How the settings of layers were chosen to meet a size."""

    asked_bytes: int = Field(
        description="of the files that hold tensors; of the tensors, where bits per weight are asked"
    )
    asked_bits_per_weight: float | None = None
    bytes: int = Field(description="what was reached of it")
    score: str | None = Field(description="what was measured; None: nothing, everything fits")
    predicted: float | None = Field(description="the sum of the scores that were chosen")
    candidates: list[dict[str, Any]]
    units: list[UnitReport]


class CandidateReport(Record):
    """One way to cut a model, and what it costs."""

    kept: dict[str, int] = Field(description="how many are left of everything that is cut")
    layers: list[int] = Field(description="numbers of the layers that are kept")
    found_by: str = Field(description="how its layers were found")
    parameters: int
    cost: float | None = Field(
        description="KL to the original in nats per token on a few calibration rows, once repaired; of models that "
        "give out no distribution a squared relative error; None: it was the only one"
    )


class CutReport(Record):
    """What was cut out of a model."""

    before: dict[str, int] = Field(description="how many there were of everything that is cut")
    criteria: dict[str, str] = Field(description="by what the parts of each kind were ranked")
    repaired: int = Field(description="linears that were fitted afterwards")
    candidates: list[CandidateReport] = Field(description="the chosen one first")


class RatioReport(Record):
    """Layers that lose the same share of their numbers."""

    layers: str
    sparsity: float = Field(description="the share that goes; 0 of a matrix that stays as it is")
    outliers: float | None = Field(description="share of their weights that stand out; None: not looked at")


class RatiosReport(Record):
    """What share of its numbers each layer loses, found before any was lost."""

    name: str = Field(description="how: owl, global, spectrum for products, or similarity for ties")
    sparsity: float = Field(description="of all of them together")
    threshold: float | None = Field(description="the magnitude below which weights go; None: there is none for all")
    units: list[RatioReport] = Field(description="what gets a share of its own, in the order of the forward pass")


class SensitivityReport(Record):
    """What each candidate costs in each unit of a model, all else being the original's."""

    model: str
    score: str = Field(
        description="kl: nats per token in the model's output; block: relative squared error of a block's"
    )
    candidates: list[dict[str, Any]]
    units: list[UnitReport]
    events: list[EventRecord] = Field(default_factory=list)


class TuneReport(Record):
    """What tuning scales, norms and biases through the whole model gained on calibration rows held back from it."""

    kl_before: float = Field(description="KL(original || this model), nats per token")
    kl_after: float = Field(description="the same of what was written; as before where that was no better")
    steps: int = Field(description="of gradient; 0: nothing was taken over")
    numbers: int = Field(description="how many were learned")
    tokens_held: int = Field(description="on which both were measured")


class LossPoint(Record):
    """One point of a training's course."""

    step: int
    kind: Literal["loss", "held"] = Field(
        description="loss: mean of the steps since the last point; held: on rows held back"
    )
    value: float = Field(description="nats per token, of what `measure` says for held, of what `loss` says for loss")


class TextReport(Record):
    """The text that a model was trained on, with what was held back of it."""

    data: str
    split: str = Field(default="train", description="of a dataset")
    origin: str = Field(description="where the text came from, in words")
    kind: Literal["text", "prompt", "chat", "classes"] = Field(description="what its entries are")
    fingerprint: str = Field(default="", description="sha256 of the token ids, and of which are counted")
    rows: int = 0
    length: int = Field(default=0, description="tokens of the longest row")
    tokens: int = 0
    counted: int = Field(default=0, description="tokens on which the loss is taken: of all, or of answers alone")


class ZerosReport(Record):
    """The zeros of one parameter that stayed while it was trained."""

    name: str = Field(description="in memory")
    weights: int = Field(description="with those that are zero")
    before: int = Field(description="zeros; each of them is one afterwards")
    after: int


class CacheReport(Record):
    """What was kept of a teacher's words, to learn from without it."""

    method: str = Field(description="sampled: KL on rows held back is an estimate without bias; topk: a lower bound")
    tokens: int = Field(description="kept of each position")
    temperature: float = Field(description="at which they were chosen")
    vocabulary: int = Field(description="tokens that they were chosen of")
    covered: float = Field(description="share of the teacher's distribution that is on them, on average")
    positions: int
    bytes: int = Field(description="of all its files")
    bytes_per_token: float
    seconds: float = Field(description="that making it took, in this run or another")


class RoundReport(Record):
    """One training of a lottery."""

    sparsity: float = Field(description="share of the weights of blocks that were zero in it")
    steps: int
    held_before: float | None = Field(description="as of the whole training, at its first step")
    held_after: float | None
    seconds: float


class TrainReport(Record):
    """What a training did."""

    teacher: str | None = Field(description="None: the text alone")
    text: TextReport | None = Field(default=None, description="None: not known")
    steps: int = Field(description="of gradient")
    tokens: int = Field(description="that were read, seen again or not")
    rows: int = Field(description="of different text")
    parameters: int = Field(description="that were trained")
    processes: int = Field(default=1, description="that shared each step")
    measure: Literal["kl", "loss"] = Field(
        description="on rows held back; kl: KL(teacher || student); loss: surprise at them"
    )
    aligned: float | None = Field(
        default=None,
        description="of a teacher that reads other tokens, the share of the positions at which both end a token; None: "
        "it reads the same",
    )
    held_before: float | None = Field(description="nats per token; None: none were held back")
    held_after: float | None = Field(description="the same afterwards")
    tokens_held: int
    zeros: list[ZerosReport] = Field(
        default_factory=list,
        description="of pruned matrices whose zeros stayed",
    )
    rounds: list[RoundReport] = Field(
        default_factory=list,
        description="trainings of a lottery: steps and tokens are of all, what was held back and the curve of the last",
    )
    loss: str = Field(default="cross entropy of the text", description="what the steps made small, in words")
    curve: list[LossPoint]
    cache: CacheReport | None = Field(default=None, description="None: the teacher was asked at every step")
    seconds: float = Field(description="of the steps, but for those that an interruption lost")


class AdapterReport(Record):
    """What learned beside a model, or within it."""

    name: str = Field(description="the kind")
    learns: int = Field(description="numbers that learned")
    share: float = Field(description="of the numbers of the model")
    bytes: int = Field(description="of all tensors of the adapter; 0: it is part of the model")
    at_most: bool = Field(default=False, description="what was planned of these is a bound")
    targets: list[str] = Field(description="ends of the names of the linears that have it; empty: it is beside none")
    classes: list[str] = Field(default_factory=list, description="that it tells apart; empty: it predicts tokens")
    accuracy: float | None = Field(default=None, description="share of the rows held back whose class it finds")
    most: float | None = Field(default=None, description="share of these that are of one class: what guessing gives")
    four_bits: bool = Field(default=False, description="the model was held as NF4 while the adapter learned")


class TextScore(Record):
    """Quality on one text. The rows allow a paired comparison with another model on the same text."""

    dataset: str
    fingerprint: str = Field(description="sha256 of the token ids")
    rows: int
    length: int = Field(description="tokens of the longest row")
    tokens: int = Field(description="tokens predicted: length - 1 per row; of an encoder, tokens read")
    protocol: str = Field(description="what was measured and how, in words")
    perplexity: float | None = Field(
        default=None,
        description="exp of the mean negative log likelihood per token; None: the model predicts no next token",
    )
    kl: float | None = Field(default=None, description="KL(original || this model), nats per token, or per row classed")
    top1: float | None = Field(default=None, description="share of tokens (rows) where both rank the same first")
    cosine: float | None = Field(default=None, description="mean cosine similarity of hidden states to the original's")
    relative_error: float | None = Field(
        default=None, description="||this - original|| / ||original|| of hidden states, or of scores without classes"
    )
    tokens_rows: list[int] = Field(
        default_factory=list, description="tokens predicted in each row; of an encoder, results compared"
    )
    nll_rows: list[float] = Field(default_factory=list, description="sum over each row's tokens, nats")
    kl_rows: list[float] = Field(default_factory=list, description="sum over each row's tokens, nats")


class ModelMeasure(Record):
    """One model as it was measured, before or after."""

    label: str
    parameters: int | None = None
    zeros: int | None = None
    tensor_bytes: int | None = Field(default=None, description="bytes of all tensors on disk")
    bits_per_weight: float | None = Field(default=None, description="tensor bits over parameters, everything counted")
    loaded_bytes: int | None = Field(default=None, description="tensors in memory after the first forward pass")
    load_seconds: float | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    peak_memory_bytes: int | None = Field(default=None, description="while loading and running, imports not counted")
    sample: str | None = Field(
        default=None, description="greedy continuation of a fixed prompt; None too where no next token is predicted"
    )
    scores: list[TextScore] = Field(default_factory=list)


class MemoryReport(Record):
    """Peak anonymous memory above the level after the imports."""

    planned_bytes: int | None = None
    measured_bytes: int | None = Field(default=None, description="of the first of several processes alone")
    device_bytes: int | None = Field(default=None, description="peak allocated on the accelerator")


class RuntimeSupport(Record):
    """Whether a runtime loads the output, why, and how that is known."""

    runtime: str
    support: Support
    reason: str
    proof: str = Field(default=BY_RULE, description="the check that proved it, or 'by rule (not run)'")


class PackReport(Record):
    """What entropy coding made of the codes."""

    codec: str
    tensors: int = Field(description="that became smaller")
    plain: int = Field(description="that would not have, and stayed as they were")
    bytes_before: int = Field(description="of all tensors of codes")
    bytes_after: int


class StageReport(Record):
    """One stage of the recipe."""

    task: str
    method: dict[str, Any] = Field(
        default_factory=dict, description="resolved settings, with the method's name; empty for eval"
    )
    format: str
    type: str | None = Field(default=None, description="the mix of block types in a GGUF file")
    layers: list[LayerReport] = Field(default_factory=list)
    transforms: list[TransformReport] = Field(default_factory=list, description="by block, in their order")
    blocks: list[BlockReport] = Field(default_factory=list, description="those that were reconstructed")
    allocation: AllocationReport | None = Field(default=None, description="None: no size was asked for")
    cut: CutReport | None = Field(default=None, description="None: no part was cut out")
    ratios: RatiosReport | None = Field(default=None, description="None: no layer's share was found by measuring")
    tuned: TuneReport | None = Field(default=None, description="None: not asked for")
    trained: TrainReport | None = Field(default=None, description="None: it was not")
    adapter: AdapterReport | None = Field(default=None, description="None: no adapter learned")
    packed: PackReport | None = Field(default=None, description="None: codes are not entropy-coded")
    bytes_before: int = Field(description="of all tensors of the model")
    bytes_after: int = Field(description="of all tensors of the model")
    planned_bytes_after: int | None = Field(
        default=None, description="where codes are packed or ranks move, what it may be at most"
    )
    bits_per_weight: float = Field(description="of all tensors over all parameters, scales and embeddings counted")
    seconds: dict[str, float] = Field(
        default_factory=dict, description="step -> seconds; those of an interrupted run count, but for compress_stage"
    )
    resumed_blocks: int = Field(default=0, description="taken over from an interrupted run")
    memory: MemoryReport = MemoryReport()
    checks: list[Check] = Field(default_factory=list)
    gates: list[GateReport] = Field(default_factory=list)
    loads_in: list[RuntimeSupport] = Field(default_factory=list)
    after: ModelMeasure | None = Field(
        default=None, description="of several stages: the model behind this one; None: there is one, or not measured"
    )


class ModelInfo(Record):
    """Where the model came from."""

    id: str
    source: str = Field(description="hub, folder or embedded")
    commit: str | None = None
    files: dict[str, str] = Field(default_factory=dict, description="file name -> sha256")
    architecture: str | None = None
    task: str = Field(default="text-generation", description="what it is for: the Hub's pipeline_tag")
    auto_class: str = Field(default="AutoModelForCausalLM", description="the class of transformers that loads it")
    licence: str | None = Field(default=None, description="SPDX id or the model card's word; None: not known")


class CalibrationReport(Record):
    """The text that calibrated the run."""

    data: str
    origin: str = Field(description="where the text came from, in words")
    fingerprint: str = Field(description="sha256 of the token ids")
    rows: int
    length: int
    tokens: int


class Report(Record):
    """Everything about one run."""

    schema_version: Literal[1] = 1
    llmshrink_version: str
    created: datetime = Field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0), description="UTC")
    command: list[str] | None = None
    recipe: dict[str, Any] = Field(description="resolved: every default written out")
    recipe_hash: str
    model: ModelInfo
    versions: dict[str, str] = Field(default_factory=dict)
    device: str
    seed: int
    threads: int
    cpu_capability: str | None = None
    calibration: CalibrationReport | None = None
    stages: list[StageReport] = Field(default_factory=list)
    before: ModelMeasure | None = None
    after: ModelMeasure | None = None
    events: list[EventRecord] = Field(default_factory=list)
    output: str | None = Field(default=None, description="the folder that was written")
    seconds: float = Field(description="wall clock of the whole run")


__all__ = [
    "AdapterReport",
    "AllocationReport",
    "BY_RULE",
    "BlockReport",
    "CalibrationReport",
    "Check",
    "EventRecord",
    "GateReport",
    "LayerReport",
    "LossPoint",
    "MemoryReport",
    "ModelInfo",
    "ModelMeasure",
    "RatioReport",
    "RatiosReport",
    "Record",
    "Report",
    "RuntimeSupport",
    "SensitivityReport",
    "StageReport",
    "Support",
    "TextReport",
    "TextScore",
    "TrainReport",
    "TransformReport",
    "TuneReport",
    "UnitReport",
]
