"""What several processes do in tests of training together: each function runs in all of them."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from tiny import config
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import llmshrink.checks.adapter
import llmshrink.job
import llmshrink.run
from llmshrink import ranks
from llmshrink.cli import main
from llmshrink.evaluate.reader import read
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.adapting import Adapting
from llmshrink.recipe.distill import LossSpec
from llmshrink.recipe.load import validate
from llmshrink.report.schema import Check
from llmshrink.train import trainer as module
from llmshrink.train.adaptation import Adaptation, Whole
from llmshrink.train.learner import Learner
from llmshrink.train.losses import mixed
from llmshrink.train.teachers import Online
from llmshrink.train.together import make_whole
from llmshrink.train.trainer import Distiller


def command(arguments: list[str], signals: dict[str, int] | None = None, shards: bool = False) -> tuple[int, Any]:
    """A command line, without a foreign reader; gives the classes of what was trained, by the step.

    `signals`: a number of a signal that each of the processes named by their numbers sends itself in its third step.
    `shards`: with FSDP 2, by accelerate, which is made to do on a CPU what it does on GPUs.
    """
    if shards:
        _shard_on_cpu()
    llmshrink.job.check_reader = lambda *_: Check(name="reader", passed=True, detail="left out")  # type: ignore[attr-defined]
    llmshrink.checks.adapter.measure = lambda requests: [read(request) for request in requests]  # type: ignore[attr-defined]
    seen: list[str] = []

    def watch(kind: type[Trainer]) -> None:
        loss = kind.compute_loss

        def noting(self: Trainer, model: nn.Module, *more: Any, **named: Any) -> Any:
            if model.training:
                seen.append(type(model).__name__)
            if len(seen) == 3 and (number := (signals or {}).get(os.environ.get("RANK", "0"))) is not None:
                seen.append("signal")
                os.kill(os.getpid(), number)
            return loss(self, model, *more, **named)

        kind.compute_loss = noting

    watch(Distiller)
    watch(Learner)
    return main(arguments), [name for name in seen if name != "signal"]


def _shard_on_cpu() -> None:
    """Let accelerate shard on a CPU, where it trains whole models by itself whatever it is asked for."""
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    os.environ.update(asked)
    begin = AcceleratorState.__init__

    def beginning(self: AcceleratorState, *given: Any, **named: Any) -> None:
        begin(self, *given, **named)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, named["fsdp_plugin"]
            PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = beginning


def _sharded(model: PreTrainedModel, layout: str) -> None:
    """Shard a model over all processes, on the CPU."""
    decoder = model.get_decoder()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if layout == "half" else None
    shard = partial(fully_shard, mp_policy=policy or MixedPrecisionPolicy())
    for block in decoder.layers:
        shard(block)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embedding.weight
    if layout in ("accelerate", "half"):  # as its fsdp2_prepare_model groups what is no block
        if not tied:
            shard(embedding)
        shard([decoder.norm, *([embedding] if tied else []), head], reshard_after_forward=False)
    elif layout == "alone":
        shard(head, reshard_after_forward=True)
    shard(model)
    assert isinstance(model, FSDPModule) and all(isinstance(block, FSDPModule) for block in decoder.layers)


def _gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Whole gradients, which are taken away."""
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, name
        whole = parameter.grad
        found[name] = whole.full_tensor() if isinstance(whole, DTensor) else whole.clone()
        parameter.grad = None
    return found


def sharded(layout: str, tied: bool, out: str) -> tuple[int, Any]:
    """Gradients of a sharded student, of two batches in a row, beside those of a whole one; and its weights again."""
    arguments = TrainingArguments(output_dir=out, report_to="none", use_cpu=True)
    student, teacher, plain = (build(seed, tied) for seed in (0, 1, 0))
    taught = Online(teacher.requires_grad_(False).eval())
    trainer = Distiller(teacher=taught, loss=LossSpec(), model=student, args=arguments)
    _sharded(student, layout)
    module.LOGITS = 2 * 160 * 4 * 4  # four positions
    rank, processes, off = int(os.environ["RANK"]), ranks.count(), 0.0
    for seed in (1, 2):
        batch = rows(seed)
        counted = int((batch["labels"][:, 1:] != -100).sum())
        mine = {key: value[rank::processes] for key, value in batch.items()}
        trainer.compute_loss(student.train(), mine, num_items_in_batch=counted).backward()
        found = _gradients(student)
        with torch.no_grad():
            assert trainer.compute_loss(student.eval(), mine).isfinite()
        given = {key: batch[key] for key in ("input_ids", "attention_mask")}
        own, other = (model(**given).logits[:, :-1].flatten(0, 1) for model in (plain.train(), teacher))
        (mixed(own, other.detach(), batch["labels"][:, 1:].flatten(), LossSpec()) / counted).backward()
        right = _gradients(plain)
        assert found.keys() == right.keys()
        off = max(off, *(float((found[name] - right[name]).norm() / right[name].norm()) for name in right))
    make_whole(student)
    same = type(student) is type(plain) and all(
        type(a) is type(b) for a, b in zip(student.modules(), plain.modules(), strict=True)
    )
    if ranks.first():
        state = plain.state_dict()
        same &= all(torch.equal(value, state[name]) for name, value in student.state_dict().items())
        same &= tied == (student.get_output_embeddings().weight is student.get_input_embeddings().weight)
        student.to(torch.bfloat16).save_pretrained(out)
    return 0, {"off": off, "same": same}


def adapted(model: str, method: str, layout: str, out: str) -> tuple[int, Any]:
    """Gradients of what learns of a sharded model beside those of a whole one; and what is saved of it."""
    stage = {"task": "lora", "method": method}
    recipe = validate({"version": 1, "model": {"id": model}, "stages": [stage]})
    adapting = Adapting(recipe, recipe.stages[0], StreamedModel(open_source(model), torch.device("cpu")))  # type: ignore[arg-type]
    probe, kind = rows(3)["input_ids"], Whole if method in ("full", "freeze") else Adaptation
    given = {} if kind is Whole else {"device": torch.device("cpu"), "steps": 2, "probe": probe}
    lesson, plain = (kind(adapting, **given) for _ in range(2))  # type: ignore[arg-type]
    for each in (lesson.model, plain.model):
        _moved(each)
    arguments = TrainingArguments(output_dir=out, report_to="none", use_cpu=True)
    trainer = lesson.trainer(args=arguments)
    _sharded(lesson.model, layout)
    rank, processes, off = int(os.environ["RANK"]), ranks.count(), 0.0
    for seed in (1, 2):
        batch = rows(seed)
        counted = (batch["labels"][:, 1:] != -100).sum()
        mine = {key: value[rank::processes] for key, value in batch.items()}
        trainer.compute_loss(lesson.model.train(), mine, num_items_in_batch=counted).backward()
        found = _gradients(lesson.model)
        with torch.no_grad():
            assert trainer.compute_loss(lesson.model.eval(), mine).isfinite()
        plain.model.train()(**batch).loss.backward()
        right = _gradients(plain.model)
        assert found.keys() == right.keys()
        off = max(off, *(float((found[name] - right[name]).norm() / right[name].norm()) for name in right))
    make_whole(lesson.model)
    same = type(lesson.model) is type(plain.model)
    if ranks.first():
        state = plain.model.state_dict()
        same &= all(torch.equal(value, state[name]) for name, value in lesson.model.state_dict().items())
        lesson.save(Path(out))
        plain.save(Path(f"{out}-plain"))
    return 0, {"off": off, "same": same}


@torch.no_grad()
def _moved(model: PreTrainedModel) -> None:
    """Away from where products are zero, and with them the gradients of their first factors."""
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def build(seed: int, tied: bool) -> PreTrainedModel:
    torch.manual_seed(seed)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config("llama-tied" if tied else "llama"))
    return made


def rows(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 100, (4, 20), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, :7] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


if __name__ == "__main__":  # launched: a file for what is found, and a command line
    code, classes = command(sys.argv[2:])
    if ranks.first():
        Path(sys.argv[1]).write_text(json.dumps(classes))
    sys.exit(code)
