"""Learning a text by an adapter beside the weights."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from llmshrink.bottleneck import BottleneckModel, is_bottleneck
from llmshrink.calibration.labelled import Labelled
from llmshrink.evaluate.foreign import compute_in_float32
from llmshrink.io.files import write_bytes, write_json
from llmshrink.model.source import Source
from llmshrink.plan.adapters import PROMPTS, let_learn
from llmshrink.plan.adapting import Adapting
from llmshrink.plan.zeros import matrices_of
from llmshrink.report.schema import TrainReport
from llmshrink.train import loftq
from llmshrink.train.adalora import Ranks
from llmshrink.train.base import decoded, load_base, save_codes
from llmshrink.train.learner import Learner
from llmshrink.train.merging import merge, pruned, save_merge, save_whole
from llmshrink.train.prompts import begin
from llmshrink.train.zeros import Zeros

ADAPTER, SETTINGS = "adapter_model.safetensors", "adapter_config.json"  # as peft calls them
CLASSES = "classes.json"  # the names of what an adapter tells apart, by number
MERGE = "merge.json"  # what merging changed
BASE = "base"  # the model in four bits that an adapter of LoftQ is for, below it
PROBE = "probe.safetensors"  # what a model gave out when it had learned, beside what it learned


class Adaptation:
    """A model, whole, with an adapter that learns."""

    task = "lora"
    teacher: str | None = None
    measure: Literal["kl", "loss"] = "loss"
    loss = "cross entropy of the text"

    def __init__(self, adapting: Adapting, device: torch.device, *, steps: int, probe: Tensor) -> None:
        """Load the model and put a new adapter beside it.

        Args:
            adapting: what learns.
            device: where.
            steps: of gradient.
            probe: token ids [rows, length] whose logits are kept once it has learned.
        """
        self._adapting, self._probe, self._device = adapting, probe, device
        if adapting.stage.anchor:
            self.loss = f"{1 - adapting.stage.anchor:g} of {self.loss}, and KL(without adapter || with it)"
        self._nested = adapting.nested is True
        with torch.random.fork_rng():
            torch.manual_seed(adapting.stage.train.seed)  # a head may be drawn
            base = load_base(
                adapting.model.source,
                device,
                four_bits=adapting.in_four_bits,
                nested=self._nested,
                classes=adapting.classes,
            )
        products = self._products(base) if adapting.name == "loftq" else {}
        with torch.random.fork_rng():
            torch.manual_seed(adapting.stage.train.seed)
            self.model: PreTrainedModel = self._with_adapter(base, steps)
        loftq.place(self.model, products)
        if adapting.name in ("prefix", "prompt"):
            begin(self.model, adapting.name, adapting.first_tokens)

    def _with_adapter(self, base: PreTrainedModel, steps: int) -> Any:
        spec = self._adapting.stage.method
        if spec.name != "adapter":
            return get_peft_model(base, self._adapting.config(steps))
        assert spec.width is not None
        return BottleneckModel(base, [matrix.module for matrix in self._adapting.places], spec.width)

    def _products(self, base: PreTrainedModel) -> dict[str, loftq.Begun]:
        """What linears begin as; the codes of the model are changed with them."""
        adapting, spec = self._adapting, self._adapting.stage.method
        assert spec.rank is not None and spec.iterations is not None
        matrices = [m for block in adapting.model.anatomy.blocks for m in block.matrices if adapting.beside(m)]
        weights = ((m.module, adapting.model.read(m)) for m in matrices)
        return loftq.begin(base, weights, spec.rank, spec.iterations)

    def trainer(self, **given: Any) -> Learner:
        """Who makes its steps."""
        if classes := bool(self._adapting.classes):
            given["data_collator"] = Padded(self.model.config.pad_token_id)
        given["anchor"] = self._adapting.stage.anchor
        if self._adapting.name != "adalora":
            return Learner(model=self.model, classes=classes, **given)
        moving = Ranks(self.model)
        given["callbacks"] = [moving, *given["callbacks"]]
        return Learner(model=self.model, beside=moving, classes=classes, **given)

    def as_it_was(self) -> AbstractContextManager[Any]:
        """The model without what stands before the text; other adapters add nothing before they have learned."""
        return self.model.disable_adapter() if self._adapting.name in PROMPTS else nullcontext()

    def tell(self, report: TrainReport) -> TrainReport:
        """The report as it is."""
        return report

    def save(self, folder: Path) -> None:
        """Write the adapter as peft does, and what it gives out."""
        source = self._adapting.model.source
        save_adapter(self.model, folder, source, beside=BASE if self._adapting.name == "loftq" else None)
        if self._adapting.classes:  # peft has no place for their names
            write_bytes(folder / CLASSES, (json.dumps(self._adapting.classes, indent=2) + "\n").encode())
        save_file({"logits": given_out(self.model, self._probe)}, folder / PROBE)
        if self._adapting.name == "loftq" and not self._adapting.stage.merge:
            save_codes(self.model.unload(), folder / BASE, source)


class Merged(Adaptation):
    """An adapter that becomes part of the weights once it has learned."""

    def save(self, folder: Path) -> None:
        """Write the whole model as a checkpoint of floats, and what merging changed."""
        source, adapter = self._adapting.model.source, folder / "adapter"
        super().save(adapter)
        meant = load_file(adapter / PROBE)["logits"]
        model: PeftModel = self.model
        if self._adapting.in_codes:  # into what it was trained against: the codes, decoded
            model = PeftModel.from_pretrained(decoded(self.model.unload()), str(adapter))
        zeros = pruned(self._adapting.model, self._adapting.stage.train.keep_zeros)
        whole, found = merge(model, source.config.dtype or torch.float32, self._probe, meant, zeros)
        save_whole(whole, folder, source)
        save_merge(found, folder / MERGE)


class Whole:
    """A model that learns itself, or some of its weights."""

    task = "lora"
    teacher: str | None = None
    measure: Literal["kl", "loss"] = "loss"
    loss = "cross entropy of the text"

    def __init__(self, adapting: Adapting) -> None:
        """Load the model in float32."""
        self._source = adapting.model.source
        self.model: PreTrainedModel = load_base(self._source, torch.device("cpu"))
        let_learn(self.model, adapting.stage.method)
        names = (matrix.parameter for matrix in matrices_of(adapting.model))
        self._zeros = Zeros(self.model, names, adapting.stage.train.keep_zeros)

    def trainer(self, **given: Any) -> Learner:
        """Who makes its steps."""
        return Learner(model=self.model, zeros=self._zeros, **given)

    def as_it_was(self) -> AbstractContextManager[Any]:
        """The model itself."""
        return nullcontext()

    def tell(self, report: TrainReport) -> TrainReport:
        """The report, with the zeros that stayed."""
        return report.model_copy(update={"zeros": self._zeros.report(self.model)})

    def save(self, folder: Path) -> None:
        """Write the model as a checkpoint, in the dtype that it was stored in."""
        save_whole(self.model.to(self._source.config.dtype or torch.float32), folder, self._source)


def load_adapted(adapting: Adapting, folder: Path, device: torch.device) -> PeftModel:
    """A model with the adapter that lies in a folder, in eval mode."""
    own = folder / BASE
    if own.is_dir():
        base = load_base(Source(BASE, own, None), device)
    else:
        base = load_base(
            adapting.model.source,
            device,
            four_bits=adapting.in_four_bits,
            nested=adapting.nested is True,
            classes=adapting.classes,
        )
    kind = BottleneckModel if is_bottleneck(folder) else PeftModel
    return kind.from_pretrained(base, str(folder)).eval()


def save_adapter(model: PeftModel, folder: Path, base: Source, *, beside: str | None = None) -> None:
    """Write an adapter such that its bytes follow from what it learned: without paths, with lists in order.

    Args:
        model: with the adapter.
        folder: to write.
        base: the model without it.
        beside: the folder below where another base lies; None: the adapter is for `base` itself.
    """
    if isinstance(model, BottleneckModel):
        model.save_pretrained(folder, base.id if base.commit else Path(base.id).name)
        return
    for config in model.peft_config.values():
        config.base_model_name_or_path = beside or (base.id if base.commit else Path(base.id).name)
        config.revision = None if beside else base.commit
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    settings = json.loads((folder / SETTINGS).read_bytes())
    write_json(folder / SETTINGS, {key: _ordered(value) for key, value in sorted(settings.items())})


def _ordered(value: Any) -> Any:
    """Lists of names in one order, each once: peft holds them in sets, which differ from process to process."""
    words = isinstance(value, list) and all(isinstance(one, str) for one in value)
    return sorted(set(value)) if words else value


def _by_place(logits: Tensor) -> Tensor:
    """Logits [rows, places, width]: those of classes are of one place."""
    return logits if logits.ndim == 3 else logits[:, None]


@torch.no_grad()
def accuracy(model: PreTrainedModel, rows: Labelled, held: int) -> float | None:
    """Share of the last rows whose class it finds; None: there are none."""
    if not held:
        return None
    device = next(model.parameters()).device
    found = [int(model(input_ids=row[None].to(device)).logits[0].argmax()) for row in rows.tokens[-held:]]
    return sum(a == b for a, b in zip(found, rows.labels[-held:], strict=True)) / held


@dataclass(frozen=True)
class Padded:
    """Makes one batch of rows of several lengths, with a class each."""

    padding: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Ids and what of them counts [rows, longest], classes [rows]."""
        rows = [example["input_ids"] for example in examples]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.padding)
        counts = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return {"input_ids": ids, "attention_mask": counts, "labels": torch.tensor([e["labels"] for e in examples])}


@torch.no_grad()
def given_out(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Logits [rows, length, vocabulary] in float32, as a reader that computes in float32 finds them; it is changed."""
    model.eval()
    compute_in_float32(model)
    device = next(model.parameters()).device
    rows = [_by_place(model(input_ids=row.to(device)).logits) for row in torch.split(tokens, 1)]
    return torch.cat(rows)[:, -tokens.shape[1] :].float().cpu().contiguous()
