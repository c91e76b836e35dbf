"""States drawn to a teacher's, against sums written out, and which layer is drawn to which."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import config
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments

from llmshrink.errors import PlanError, RecipeError
from llmshrink.plan.pairs import layer_pairs
from llmshrink.recipe.distill import LossSpec
from llmshrink.recipe.load import validate
from llmshrink.recipe.modes import HiddenSpec
from llmshrink.train.hidden import Likeness, apart
from llmshrink.train.losses import mixed
from llmshrink.train.run import _keep_less
from llmshrink.train.teachers import Online
from llmshrink.train.trainer import Distiller


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def brute(own: Tensor, wanted: Tensor, kind: str) -> float:
    pairs = list(zip(own.double().tolist(), wanted.double().tolist(), strict=True))
    if kind == "cosine":
        return sum(1 - dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)) for a, b in pairs)
    squares = [sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a) for a, b in pairs]
    if kind == "mse":
        return sum(squares)
    return len(pairs) * sum(squares) / sum(dot(b, b) / len(b) for _, b in pairs)


@pytest.mark.parametrize("kind", ["squarehead", "mse", "cosine"])
def test_a_distance_is_its_sum(kind: str) -> None:
    own, wanted = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).unbind()
    assert float(apart(own, 3 * wanted, kind)) == pytest.approx(brute(own, 3 * wanted, kind), rel=1e-5)
    assert float(apart(own[:0], wanted[:0], kind)) == 0


def model(family: str, seed: int, **more: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    still = dict.fromkeys(("dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config(family, num_hidden_layers=3, **still, **more))
    return made


def rows() -> dict[str, Tensor]:
    ids = torch.randint(3, 100, (3, 20), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :7] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def distiller(folder: Path, student: PreTrainedModel, teacher: PreTrainedModel, spec: HiddenSpec, **given: Any) -> Any:
    online = Online(teacher)
    likeness = Likeness(student, online, {0: 1, 1: 0}, spec)
    arguments = TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True)
    return Distiller(
        teacher=online, loss=LossSpec(**given.pop("loss", {})), hidden=likeness, model=student, args=arguments,
        **given,
    )  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_term_is_that_of_whole_models(tmp_path: Path, family: str, alpha: float, checkpointing: bool) -> None:
    student, teacher = model(family, 0), model(family, 1).eval().requires_grad_(False)
    if checkpointing:
        _keep_less(student)
    batch, spec, loss = rows(), HiddenSpec(weight=0.3), LossSpec(alpha=alpha)
    made = distiller(tmp_path, student, teacher, spec, loss={"alpha": alpha})
    student.config.use_cache = False
    found = made.compute_loss(student.train(), batch, num_items_in_batch=40)
    found.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    given = {key: batch[key] for key in ("input_ids", "attention_mask")}
    own, other = (one(**given, output_hidden_states=True, use_cache=False) for one in (student, teacher))
    labels = batch["labels"][:, 1:]
    words = mixed(own.logits[:, :-1].flatten(0, 1), other.logits[:, :-1].flatten(0, 1), labels.flatten(), loss)
    states = [
        [out.hidden_states[layer + 1][:, :-1][labels != -100] for out, layer in ((own, a), (other, b))]
        for a, b in ((0, 1), (1, 0))
    ]
    terms = [len(s) * (s - t).square().sum() / t.square().sum() for s, t in states]
    wanted = (words + 0.3 * (terms[0] + terms[1]) / 2) / 40
    wanted.backward()
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5), name


def test_projections_begin_as_the_best_there_are(tmp_path: Path) -> None:
    student, teacher = model("llama", 0, hidden_size=32), model("llama", 1).eval().requires_grad_(False)
    data = [{"input_ids": row, "labels": row} for row in torch.randint(3, 100, (16, 20))]
    names = {name for name, _ in student.named_parameters()}
    made = distiller(tmp_path, student, teacher, HiddenSpec(), train_dataset=data)
    ids = torch.stack([row["input_ids"] for row in data])[:16]  # 16 rows of 19 tokens that count are enough for 32
    with torch.no_grad():
        own, other = (one(ids, output_hidden_states=True).hidden_states for one in (student, teacher))
    for layer, wanted in ((0, 1), (1, 0)):
        s, t = (out[n + 1][:, :-1].flatten(0, 1).double() for out, n in ((own, layer), (other, wanted)))
        gram = s.T @ s
        gram += 1e-2 * gram.diagonal().mean() * torch.eye(32)
        learned = student.get_decoder().projections[str(layer)].weight
        assert torch.allclose(learned.double(), (gram.inverse() @ s.T @ t).T, atol=1e-4)
    made.compute_loss(student.train(), rows()).backward()
    assert learned.grad is not None and learned.grad.any()
    made._hidden.remove()
    assert {name for name, _ in student.named_parameters()} == names


def test_states_of_other_tokens_are_those_at_their_places() -> None:
    student, teacher = model("llama", 0), Online(model("llama", 1).requires_grad_(False))
    likeness = Likeness(student, teacher, {0: 1}, HiddenSpec(loss="mse"))
    ids = rows()["input_ids"]
    others = torch.randint(3, 100, (3, 9), generator=torch.Generator().manual_seed(2))
    teacher.places = torch.randint(-1, 9, (3, 20), generator=torch.Generator().manual_seed(3))
    with likeness.watching(), torch.no_grad():
        own, wanted = (one(x, output_hidden_states=True) for one, x in ((student, ids), (teacher.model, others)))
    counted = torch.rand(3, 19, generator=torch.Generator().manual_seed(4)) < 0.7
    total = 0.0
    for row in range(3):
        for i in range(19):
            place = int(teacher.places[row, i])
            if counted[row, i] and place >= 0:
                difference = own.hidden_states[1][row, i] - wanted.hidden_states[2][row, place]
                total += float(difference.square().mean())
    assert float(likeness.loss(counted)) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize(
    ("student", "teacher", "kept", "wanted"),
    [
        (2, 3, [0, 2], {0: 1, 1: 2}),  # what enters layer 2 leaves layer 1
        (6, 8, [0, 1, 2, 5, 6, 7], {0: 0, 1: 1, 2: 4, 3: 5, 4: 6, 5: 7}),
        (2, 4, [2, 3], {0: 2, 1: 3}),
        (2, 4, [0, 1], {0: 0, 1: 3}),
        (3, 6, None, {0: 1, 1: 3, 2: 5}),
        (6, 3, None, {0: 0, 1: 0, 2: 1, 3: 1, 4: 1, 5: 2}),
        (3, 3, None, {0: 0, 1: 1, 2: 2}),
    ],
)
def test_layers_find_their_teacher(student: int, teacher: int, kept: list[int] | None, wanted: dict[int, int]) -> None:
    assert layer_pairs(HiddenSpec(), student, teacher, kept) == wanted


def test_layers_that_are_not_there_are_refused() -> None:
    for named, who in (({2: 0}, "student, which has 2, from 0 to 1"), ({0: 3}, "teacher, which has 3")):
        with pytest.raises(PlanError, match=who):
            layer_pairs(HiddenSpec(layers=named), 2, 3, None)
    for layers, why in (({}, "at least one layer"), ({-1: 0}, "at least one layer"), ({"a": 0}, "valid integer")):
        with pytest.raises(RecipeError, match=why):
            validate(
                {"version": 1, "model": {"id": "x"}, "stages": [{"task": "distill", "hidden": {"layers": layers}}]}
            )
