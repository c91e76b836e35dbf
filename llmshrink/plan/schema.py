"""A plan as data: what `--plan --json` prints and the report is compared with."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from llmshrink.formats.runtimes import Support


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerPlan(_Part):
    """One matrix [out, in]; `method` is None where it is left as it is, and `reason` says why."""

    name: str
    shape: tuple[int, int]
    parameters: int
    method: str | None
    bits: int | None
    group_size: int | None
    type: str | None  # what the format calls it, where it has several: a block type of GGUF
    bytes_before: int
    bytes_after: int
    reason: str | None
    shape_before: tuple[int, int] | None = None  # where parts of it are cut out
    open: bool = False  # its method's settings are chosen by measuring; the bytes are of one way to meet the size


class AllocationPlan(_Part):
    """What is chosen by measuring, and between which sizes."""

    candidates: list[dict[str, Any]]  # the method's keys that differ
    units: int  # of layers that get the same candidate
    counted: Literal["files", "tensors"]  # what the bytes below are of: with headers, or of tensors alone
    asked_bytes: int
    smallest_bytes: int
    largest_bytes: int


class RatiosPlan(_Part):
    """How the sparsity of each layer is found by measuring.

    The bytes of the plan are those of equal shares, which differ from what is found by rounding alone.
    """

    name: str
    sparsity: float  # of all weights for which it is found
    units: int  # that get a share of their own


class CutPlan(_Part):
    """What is cut out of a model; where it is found out by measuring, the first of what is tried."""

    before: dict[str, int]  # how many there are: layers, neurons, heads, channels of the states
    kept: dict[str, int]  # and how many are left
    layers: list[int] | None  # which layers are kept; None: found out by measuring
    candidates: int  # shapes that are tried
    repaired: int  # linears that are fitted afterwards
    parameters_before: int


class CachePlan(_Part):
    """What is written down of a teacher, so that the student learns without it."""

    method: str
    tokens: int  # kept of each position
    temperature: float  # at which they are chosen
    bytes_per_token: int
    bytes: int  # of what is made, at most; 0: it is there, or only the text says how much it is
    found: bool  # it is there already


class TrainPlan(_Part):
    """How a model learns from another one."""

    teacher: str
    steps: int | None  # of gradient; None: as many as the text gives, which is not read for a plan
    tokens: int  # of a step
    processes: int = 1  # that share it
    cache: CachePlan | None = None  # None: the teacher is asked at every step
    trainings: int = 1  # one after another, of so many steps; of a lottery


class AdapterPlan(_Part):
    """What learns beside a model, or within it."""

    name: str  # of its kind
    targets: list[str]  # ends of the names of the linears that have it
    learns: int  # numbers
    bytes: int  # of its tensors
    at_most: bool  # what is left of it is known when it has learned
    steps: int | None  # of gradient; None: as many as the text gives, which is not read for a plan
    tokens: int  # of a step


class BlockPlan(_Part):
    """One decoder block."""

    index: int
    layers: list[LayerPlan]


class TensorPlan(_Part):
    """Any other tensor, copied as it is, or decoded where it was compressed."""

    name: str
    bytes_before: int
    bytes_after: int
    parameters: int


class PlanEvent(_Part):
    """Something the plan does differently from what the recipe says."""

    kind: str
    message: str
    layer: str | None = None


class LoadPlan(_Part):
    """Whether a runtime will load the result, why, and where that is known from."""

    runtime: str
    support: Support
    reason: str
    source: str


class Plan(_Part):
    """The whole plan; bytes of tensors before and after, exact unless it says that they are a bound."""

    model: str
    architecture: str
    method: str
    format: str
    type: str | None  # the mix of block types in a GGUF file
    transforms: str | None  # what is done to weights before they are compressed; None: nothing
    allocation: AllocationPlan | None  # None: every layer's settings are known
    cut: CutPlan | None = None  # None: no part is cut out
    training: TrainPlan | None = None  # None: nothing learns from another model
    adapter: AdapterPlan | None = None  # None: no adapter learns
    ratios: RatiosPlan | None = None  # None: each layer's sparsity is known
    learning_steps: int  # of gradient for each block after the method; 0: none
    tuning_steps: int  # of gradient through the whole model after that; 0: none
    blocks: list[BlockPlan]
    outside: list[LayerPlan]  # the embedding and the head, where the recipe names them
    others: list[TensorPlan]
    parameters: int
    parameters_compressed: int
    bytes_before: int
    bytes_after: int  # of all tensors
    bytes_are_bound: bool = False  # of plain codes, where entropy coding makes them fewer by what only weights can say
    file_bytes: dict[str, int]  # every safetensors file of the output, with its header
    max_bytes: int | None  # what all of them together may have by `gate.max_size`; None: no limit
    bits_per_weight: float  # of the whole file over all parameters
    memory_bytes: int  # peak anonymous memory of the compress step above the level after the imports
    evaluation_bytes: int  # the same of the comparison of both models; 0: none is asked for
    disk_bytes: int  # output, and what a resume needs beside it
    disk_free: int
    output: str
    loads_in: list[LoadPlan]
    events: list[PlanEvent]

    @property
    def layers(self) -> list[LayerPlan]:
        """All matrices that a method may compress."""
        return [*(layer for block in self.blocks for layer in block.layers), *self.outside]
