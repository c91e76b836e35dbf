"""The loss of a batch, some positions at a time, against the same of whole logits; and what is no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import config
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PrinterCallback, TrainingArguments

from llmshrink.errors import InputError
from llmshrink.recipe.distill import LossSpec
from llmshrink.report.schema import TextReport
from llmshrink.train import trainer as module
from llmshrink.train.data import collate, write
from llmshrink.train.losses import mixed
from llmshrink.train.packing import Row
from llmshrink.train.teachers import Online
from llmshrink.train.trainer import Distiller


def model(seed: int, **more: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config("llama", **more))
    return made


def distiller(folder: Path, student: PreTrainedModel, teacher: PreTrainedModel | None, **loss: Any) -> Distiller:
    arguments = TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True)
    taught = None if teacher is None else Online(teacher.requires_grad_(False))
    return Distiller(teacher=taught, loss=LossSpec(**loss), model=student, args=arguments)


def rows() -> dict[str, Tensor]:
    ids = torch.randint(3, 100, (3, 20), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :7] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("loss", [{}, {"alpha": 0.5, "temperature": 1.0}, {"alpha": 0.0}, {"name": "jsd"}])
@pytest.mark.parametrize("padding", [0, 16])
def test_a_stretch_at_a_time_is_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: dict[str, Any], padding: int
) -> None:
    monkeypatch.setattr(module, "LOGITS", 3 * 160 * 4 * 4)  # four positions
    student, teacher = model(0), model(1, vocab_size=160 + padding).eval()
    batch = rows()
    distiller(tmp_path, student, teacher, **loss).compute_loss(student, batch, num_items_in_batch=40).backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    given = {key: batch[key] for key in ("input_ids", "attention_mask")}
    own, other = (one(**given).logits[:, :-1, :160].flatten(0, 1) for one in (student, teacher))
    (mixed(own, other.detach(), batch["labels"][:, 1:].flatten(), LossSpec(**loss)) / 40).backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and torch.allclose(found[name], parameter.grad, rtol=1e-3, atol=1e-6), name
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("loss", [{}, {"alpha": 0.0}, {"name": "reverse-kl", "alpha": 0.5}])
def test_what_is_measured_is_the_divergence(tmp_path: Path, loss: dict[str, Any]) -> None:
    student, teacher, batch = model(0).eval(), model(1).eval(), rows()
    with torch.no_grad():
        found = distiller(tmp_path, student, teacher, **loss).compute_loss(student, batch, num_items_in_batch=1000)
        given = {key: batch[key] for key in ("input_ids", "attention_mask")}
        q, p = (one(**given).logits[:, :-1].double().log_softmax(-1) for one in (student, teacher))
        each = (p.exp() * (p - q)).sum(-1)[batch["labels"][:, 1:] != -100]
    assert float(found) == pytest.approx(float(each.mean()), rel=1e-4)


def test_what_is_no_number_names_the_step_and_the_rows(tmp_path: Path) -> None:
    student = model(0)
    with torch.no_grad():
        student.lm_head.weight[5] = torch.nan
    with pytest.raises(InputError, match=r"step 0 is no number; its rows begin with the tokens \[\["):
        distiller(tmp_path, student, model(1)).compute_loss(student, rows())


def test_what_is_measured_of_unequal_rows_is_per_token(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    given = [
        Row(draw.integers(3, 100, size, dtype=np.int32), draw.random(size) < share, 0)
        for size, share in ((20, 1.0), (5, 0.5), (9, 0.3), (14, 0.9), (3, 1.0))
    ]
    told = TextReport(data="a", origin="a", kind="prompt")
    part, _ = write(tmp_path / "text", given, {}, lambda: (told, [])).parts(0)
    student, teacher = model(0).eval(), model(1).eval()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, per_device_eval_batch_size=2, disable_tqdm=True,
        remove_unused_columns=False, prediction_loss_only=True,
    )  # fmt: skip
    taught = Online(teacher.requires_grad_(False))
    made = Distiller(
        teacher=taught, loss=LossSpec(), model=student, args=arguments, eval_dataset=part, data_collator=collate
    )
    made.remove_callback(PrinterCallback)
    each = []
    with torch.no_grad():
        for i in range(len(part)):
            q, p = (
                one(part[i]["input_ids"][None]).logits[0, :-1].double().log_softmax(-1) for one in (student, teacher)
            )
            each += (p.exp() * (p - q)).sum(-1)[part[i]["labels"][1:] != -100].tolist()
    assert made.evaluate()["eval_loss"] == pytest.approx(sum(each) / len(each), rel=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_products_may_be_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    """As on a GPU: the loss stays in float32, and every stretch of positions gives its gradient to the head."""
    monkeypatch.setattr(module, "LOGITS", 3 * 160 * 4 * 4)
    student, teacher, batch = model(0, tie_word_embeddings=tied), model(1).eval(), rows()
    trainer, found = distiller(tmp_path, student, teacher), []
    for rounded in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            loss = trainer.compute_loss(student, batch, num_items_in_batch=40)
        loss.backward()
        assert loss.dtype == torch.float32 and loss.isfinite()
        found.append({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
        student.zero_grad()
    exact, near = found
    for name, gradient in exact.items():
        assert 0 < (near[name] - gradient).norm() < 0.05 * gradient.norm(), name
