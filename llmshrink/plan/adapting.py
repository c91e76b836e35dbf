"""From a stage that adapts a model to what learns of it, how much that is, and what is refused before anything does."""

from __future__ import annotations

from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from llmshrink import ranks
from llmshrink.errors import PlanError
from llmshrink.forms import Event
from llmshrink.methods import load_method
from llmshrink.model.anatomy import Matrix
from llmshrink.model.skeleton import build
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.adapters import IN_FOUR_BITS, PROMPTS, AdapterSize, Linears, adapter_size, first_tokens, peft_config
from llmshrink.plan.again import AGAIN, as_quantized
from llmshrink.plan.layout import default_output
from llmshrink.plan.linears import find_linears, shortest, writers
from llmshrink.plan.resolve import resolve
from llmshrink.plan.steps import Steps
from llmshrink.plan.training import trained_work
from llmshrink.plan.work import Work
from llmshrink.recipe.adapter import WRITES_MODEL
from llmshrink.recipe.lora import LoraStage
from llmshrink.recipe.schema import Recipe
from llmshrink.recipe.stages import QuantizeStage
from llmshrink.recipe.train import TrainSpec

if TYPE_CHECKING:
    from peft import PeftConfig

SOME_STEPS = 1000  # where the text decides how many there are
LARGE = 64  # a rank from which on the usual factor of LoRA lets it learn too little


class Adapting:
    """What a stage adapts.

    Attributes:
        stage: What the recipe says.
        model: That comes in.
        steps: Of gradient.
        linears: Beside which an adapter stands.
        events: What people should know of that.
    """

    needs_data = False  # to calibrate with

    def __init__(self, recipe: Recipe, stage: LoraStage, model: StreamedModel, classes: tuple[str, ...] = ()) -> None:
        """Find what learns; `classes`: names of those that are told apart.

        Raises:
            PlanError: the model cannot be adapted so.
        """
        self.stage, self.model, self._recipe, self.classes = stage, model, recipe, classes
        self.events: list[Event] = []
        self._refuse()
        if ranks.sharded():
            self._refuse_sharded()
        if self.in_four_bits:
            self._refuse_widths()
        self.steps = Steps(self._shorter(), model)
        self.steps.check()
        self.linears: Linears = find_linears(model, stage.target, apart=stage.method.name == "ia3")
        if self.name in ("prefix", "prompt"):
            _ = self.first_tokens  # a text without tokens is refused here
        self._tell()

    @property
    def name(self) -> str:
        """Of the kind of adapter."""
        return self.stage.method.name

    @property
    def in_four_bits(self) -> bool:
        """Whether the model is in memory as NF4 while its adapter learns."""
        return self.name in IN_FOUR_BITS

    @property
    def targets(self) -> tuple[str, ...]:
        """Ends of the names of the linears that an adapter stands beside."""
        if self.name == "adapter":
            return shortest([[matrix.module for matrix in self.places]], self.model.model)[0]
        return () if self.name in (*PROMPTS, *WRITES_MODEL) else self.linears.names

    def beside(self, matrix: Matrix) -> bool:
        """Whether an adapter stands beside a linear."""
        return matrix.kind != "experts" and any(
            matrix.module == end or matrix.module.endswith(f".{end}") for end in self.targets
        )

    @property
    def output(self) -> Path:
        """The folder of the result."""
        default = default_output(self.model.source.id, self.name)
        return Path(self._recipe.output).expanduser() if self._recipe.output else default

    @property
    def in_codes(self) -> bool:
        """Whether the model is in memory as codes while its adapter learns; others than of bitsandbytes are decoded."""
        return self.in_four_bits or self.model.weights.format.name == "bnb"

    @property
    def nested(self) -> bool | None:
        """Whether scales of the four bits are in 8 bits too; None: the model is as it is stored."""
        return self.name == "qlora" if self.in_four_bits else None

    def shorter(self, length: int) -> int:
        """So many tokens, or fewer, to leave room for what stands before a row."""
        if self.name not in PROMPTS or self.model.positions is None:
            return length
        return min(length, self.model.positions - (self.stage.method.tokens or 0))

    def _refuse(self) -> None:
        model, name = self.model, self.name
        stored = model.weights.format.name
        if not model.task.causal and self.stage.label is None:
            raise PlanError(
                f"{model.source.id}: only models that predict the next token learn from text.",
                hint="A model of classes learns from rows with a class: name its column with --label.",
            )
        if model.source.gguf or (self.classes and stored not in ("dense", "bnb")):
            what = "classes are learned beside" if self.classes else "peft reads adapters beside"
            raise PlanError(f"{model.source.id} is stored as {stored}: {what} floats.", hint=AGAIN)
        if stored != "dense" and self.stage.method.name in ("full", "freeze"):
            raise PlanError(
                f"{model.source.id} is stored as {stored}: codes do not learn, adapters beside them do.",
                hint="Take --method lora, or `llmshrink export --to dense` first.",
            )
        if stored != "dense" and self.in_four_bits:
            raise PlanError(
                f"{model.source.id} is quantized already: {name} quantizes it first.", hint="Take --method lora."
            )
        if self.stage.merge:
            as_quantized(model)  # what cannot be is refused here

    def _refuse_sharded(self) -> None:
        """What shards cannot do (FSDP)."""
        why, other = "", ", or take --method lora"
        if self.in_codes:
            why = "codes are not sharded: each process would hold all of the model"
            other = other if self.in_four_bits else ", or `llmshrink export --to dense` first"
        elif self.name in PROMPTS:
            why = f"what is saved of {self.name} is computed from whole weights"
        elif self.name == "adalora":
            why = "adalora looks at whole products after they were sharded again"
        if why:
            raise PlanError(f"FSDP was asked for, and {why}.", hint=f"Launch without --use_fsdp{other}.")

    def _refuse_widths(self) -> None:
        """Linears whose four bits bitsandbytes would misread."""
        kind = load_method("nf4")
        method = kind(kind.Config())
        for block in self.model.anatomy.blocks:
            for matrix in block.matrices:
                if matrix.kind == "subclass" or (why := method.check(matrix.shape)) is not None:
                    said = "bitsandbytes leaves linears of this class as they are" if matrix.kind == "subclass" else why
                    raise PlanError(f"{self.name}: {matrix.name}: {said}.", hint="Take --method lora.")

    def _shorter(self) -> TrainSpec:
        """How it learns, with room in each row for what stands before it."""
        spec = self.stage.train
        if self.name not in PROMPTS or self.model.positions is None:
            return spec
        room = self.shorter(self.model.positions)
        if room < 2:
            raise PlanError(
                f"{self.stage.method.tokens} tokens before the text leave none of the {self.model.positions} positions "
                f"of {self.model.source.id}.",
                hint="Take fewer: method.tokens.",
            )
        return spec.model_copy(update={"length": min(Steps(spec, self.model).length, room)})

    def _tell(self) -> None:
        spec = self.stage.method
        if self.model.weights.format.name == "compressed-tensors" and not self.stage.writes_model:
            message = (
                "peft stands beside this model once it is decoded: run it once before, or load it with "
                "quantization_config=CompressedTensorsConfig(dequantize=True)"
            )
            self.events.append(Event("caution", message))
        if spec.name in ("lora", "dora", "qlora") and (spec.rank or 0) >= LARGE:
            message = f"rank {spec.rank}: rslora scales such products so that all of it learns"
            self.events.append(Event("caution", message))
        experts = sum(m.kind == "experts" for block in self.model.anatomy.blocks for m in block.matrices)
        if experts and spec.name not in (*PROMPTS, "full", "freeze"):
            self.events.append(Event("left_dense", f"{experts} matrices of experts get no adapter"))

    def config(self, steps: int) -> PeftConfig:
        """The adapter in peft's words, for so many steps of gradient."""
        if not self.classes:
            return peft_config(self.stage.method, self.linears, steps=steps)
        return peft_config(self.stage.method, self.linears, steps=steps, task="SEQ_CLS", heads=self._heads)

    @property
    def _sorter(self) -> PreTrainedModel:
        """A new model, on `meta`, that tells classes apart."""
        config = with_classes(self.model.source.config, self.classes)
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config, dtype=self.model.dtype)

    @cached_property
    def _heads(self) -> list[str]:
        """What of that the model that comes in has not, besides its head a pooler: it is drawn, learns, and is kept."""
        sorter = self._sorter
        prefix = f"{sorter.base_model_prefix}."
        known = {name.removeprefix(prefix) for name, _ in self.model.model.named_parameters()}
        new = [name.removeprefix(prefix) for name, _ in sorter.named_parameters()]
        own = self.model.task.by_row  # a head of its own learns on
        found = dict.fromkeys(name.partition(".")[0] for name in new if name not in known)
        return list(found) or [name for name in ("score", "classifier") if own and hasattr(sorter, name)]

    @cached_property
    def first_tokens(self) -> Tensor:
        """Ids [1, tokens] of what a prompt or a prefix begins as."""
        spec = self.stage.method
        tokenizer = None if spec.text is None else self.model.source.tokenizer
        return first_tokens(spec, tokenizer, vocabulary=self.model.vocabulary, seed=self.stage.train.seed)

    @cached_property
    def places(self) -> list[Matrix]:
        """Linears whose outputs a bottleneck follows."""
        both = writers(self.model)
        return [m for own in both for m in (own if self.stage.method.placement == "houlsby" else own[-1:])]

    @cached_property
    def size(self) -> AdapterSize:
        """How much learns."""
        spec, model = self.stage.method, self.model
        if spec.name == "adapter":
            assert spec.width is not None
            each = 2 * spec.width * model.hidden + spec.width + model.hidden
            return AdapterSize(each * len(self.places), 4 * each * len(self.places))
        skeleton = self._sorter if self.classes else build(model.source.config, model.dtype, all_meta=True)
        return adapter_size(spec, self.config(self.steps.limit or SOME_STEPS), skeleton)

    @cached_property
    def own_base(self) -> int:
        """Bytes of all tensors of the base that is written below an adapter of LoftQ; 0: it is for the model itself."""
        if self.name != "loftq" or self.stage.writes_model:
            return 0
        rounding = {"task": "quantize", "method": {"name": "nf4", "block_size": 64, "double_quant": False}}
        recipe = self._recipe.model_copy(update={"output": str(self.output)})
        return sum(resolve(recipe, QuantizeStage.model_validate(rounding), self.model).tensor_bytes.values())

    def work(self, model: StreamedModel) -> Work:
        """The work of writing a whole model as it was left, quantized again as the one that came in was."""
        recipe = self._recipe.model_copy(update={"output": str(self.output)})
        if (again := as_quantized(self.model)) is None:
            work = trained_work(recipe, model, str(self.output))
        else:
            work = resolve(recipe, again, model)
            work.events = [event for event in work.events if event.kind != "requantized"]  # asked for
        work.events += self.events
        return work


def with_classes(config: PretrainedConfig, classes: tuple[str, ...]) -> PretrainedConfig:
    """A copy of a configuration for a model that tells these apart."""
    found = deepcopy(config)
    found.id2label = dict(enumerate(classes))
    found.label2id = {name: number for number, name in enumerate(classes)}
    if found.pad_token_id is None:  # where a row ends is seen by it
        ends = found.eos_token_id if isinstance(found.eos_token_id, list) else [found.eos_token_id]
        found.pad_token_id = ends[0] if ends[0] is not None else 0
    return found
