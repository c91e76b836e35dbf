"""Rows in a student's own words, against what it says one token after another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import config
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments

from llmshrink.recipe.distill import LossSpec
from llmshrink.recipe.modes import PolicySpec
from llmshrink.train.losses import mixed
from llmshrink.train.policy import Policy
from llmshrink.train.teachers import Online
from llmshrink.train.trainer import Distiller

GREEDY = {"share": 1.0, "temperature": 1e-4}


def model(seed: int, family: str = "llama") -> PreTrainedModel:
    torch.manual_seed(seed)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config(family)).eval()
    return made


def batch(rows: int = 3, length: int = 12) -> dict[str, Tensor]:
    ids = torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, 0] = -100  # as in all rows that are learned from
    return {"input_ids": ids, "labels": labels}


@torch.no_grad()
def greedy(student: PreTrainedModel, prompt: Tensor, count: int) -> Tensor:
    row = prompt[None]
    for _ in range(count):
        row = torch.cat([row, student(row).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return row[0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_go_on_as_the_student_does(family: str) -> None:
    student, given = model(0, family), batch()
    found = Policy(student, PolicySpec(**GREEDY, prompt=0.3), 0).rows(given, 0)
    for row, labels, text in zip(found["input_ids"], found["labels"], given["input_ids"], strict=True):
        assert torch.equal(row, greedy(student, text[:4], 8))
        assert labels.tolist() == [-100] * 4 + row[4:].tolist()
    assert found["attention_mask"].all() and found["drawn"]
    few = Policy(student, PolicySpec(**GREEDY, prompt=0.3, tokens=2), 0).rows(given, 0)
    assert torch.equal(few["input_ids"], found["input_ids"][:, :6])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_answers_begin_and_end_where_they_should(family: str) -> None:
    student, given = model(0, family), batch(rows=2)
    given["labels"][0, :3] = -100
    given["labels"][1, :6] = -100
    given["labels"][1, 10:] = -100
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    given["attention_mask"][1, 10:] = 0
    long = [greedy(student, row[:first], 6) for row, first in zip(given["input_ids"], (3, 6), strict=True)]
    student.generation_config.eos_token_id = [int(long[0][5]), 159]
    found = Policy(student, PolicySpec(**GREEDY), 0).rows(given, 0)
    stop = set(student.generation_config.eos_token_id)
    for r, (whole, first) in enumerate(zip(long, (3, 6), strict=True)):
        last = next((i + 1 for i, token in enumerate(whole.tolist()) if i >= first and token in stop), len(whole))
        row, labels, mask = (found[key][r] for key in ("input_ids", "labels", "attention_mask"))
        rest = len(row) - last
        assert torch.equal(row[:last], whole[:last]) and mask.tolist() == [1] * last + [0] * rest
        assert labels.tolist() == [-100] * first + whole[first:last].tolist() + [-100] * rest


def test_what_is_drawn_follows_from_the_number_of_the_batch() -> None:
    policy = Policy(model(0), PolicySpec(share=0.3), 5)
    drawn = [policy.rows(batch(), number) for number in range(40)]
    assert 4 <= sum("drawn" in found for found in drawn) <= 20
    torch.manual_seed(77)
    before = torch.random.get_rng_state()
    again = [policy.rows(batch(), number) for number in range(40)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(drawn, again, strict=True))
    number = next(i for i, found in enumerate(drawn) if "drawn" in found)
    other = policy.rows(batch(), number, rank=1)
    assert "drawn" in other and not torch.equal(other["input_ids"], drawn[number]["input_ids"])


def test_tokens_are_as_frequent_as_they_are_likely() -> None:
    student = model(0)
    student.generation_config.top_k, student.generation_config.repetition_penalty = 2, 3.0
    ids = torch.tensor([[5, 9, 7]]).expand(4000, -1)
    student.train()
    spec = PolicySpec(share=1.0, prompt=0.6, temperature=2.0)
    found = Policy(student, spec, 0).rows({"input_ids": ids, "labels": ids}, 0)["input_ids"][:, 2]
    assert student.training and student.generation_config.top_k == 2
    with torch.no_grad():
        wanted = (student(ids[:1, :2]).logits[0, -1] / 2).softmax(-1)
    assert (found.bincount(minlength=len(wanted)) / len(found) - wanted).abs().sum() / 2 < 0.1


def test_only_what_the_teacher_finds_of_them_counts(tmp_path: Path) -> None:
    student, teacher = model(0), model(1).requires_grad_(False)
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    given: dict[str, Any] = {"loss": LossSpec(alpha=0.25), "policy": PolicySpec(share=1.0), "args": arguments}
    made = Distiller(teacher=Online(teacher), model=student, **given)
    (drawn,), count = made.get_batch_samples(iter([batch()]), 1, torch.device("cpu"))
    assert int(count) == 3 * 9
    found = made.compute_loss(student.train(), drawn, num_items_in_batch=count)
    with torch.no_grad():
        own, other = (one(drawn["input_ids"]).logits[:, 2:-1].flatten(0, 1) for one in (student, teacher))
        wanted = mixed(own, other, drawn["labels"][:, 3:].flatten(), LossSpec(alpha=1.0)) / 27
    assert float(found.detach()) == pytest.approx(float(wanted), rel=1e-4)
