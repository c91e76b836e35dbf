"""Zeros that stay: exactly, under every optimizer, and as if they were no weights at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import config
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments

import llmshrink
from llmshrink.errors import GateError
from llmshrink.recipe.distill import LossSpec
from llmshrink.train.run import OPTIMIZERS
from llmshrink.train.trainer import Distiller
from llmshrink.train.zeros import Zeros


def pruned(share: float = 0.5) -> tuple[PreTrainedModel, list[str]]:
    """A model of which the smallest weights of each matrix are zero, and the names of these."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config("llama"))
    names = [name for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    with torch.no_grad():
        for name in names:
            weight = model.get_parameter(name)
            weight[weight.abs() < weight.abs().flatten().quantile(share)] = 0
    return model, names


def trained(folder: Path, model: PreTrainedModel, zeros: Zeros | None, **more: Any) -> None:
    rows = torch.randint(3, 100, (24, 12), generator=torch.Generator().manual_seed(1))
    arguments = {"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **more}
    given = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", **arguments
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Distiller(teacher=None, loss=LossSpec(alpha=0), zeros=zeros, model=model, args=given, train_dataset=data)
    trainer.train()


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if "paged" not in name])  # that is of a GPU
def test_zeros_stay_under_every_optimizer(tmp_path: Path, optimizer: str) -> None:
    model, names = pruned()
    before, zeros = weights(model), Zeros(model, names, "auto")
    trained(tmp_path, model, zeros, optim=OPTIMIZERS[optimizer], learning_rate=1e-2, weight_decay=0.1)
    for name, weight in weights(model).items():
        gone = before[name] == 0
        assert not weight[gone].any() if name in names else not gone.any(), name
        assert (weight != before[name])[~gone].float().mean() > 0.5, name
    found = zeros.report(model)
    assert [one.name for one in found] == names and all(one.before == one.after for one in found)
    assert sum(one.before for one in found) == pytest.approx(0.5 * sum(one.weights for one in found), rel=1e-2)


def test_what_is_gone_does_not_count_in_the_norm(tmp_path: Path) -> None:
    """A step is that of a model that has these weights only: gradients of all others are cut by their own norm."""
    model, names = pruned()
    before = weights(model)
    batch = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(2))
    twin, _ = pruned()
    twin(input_ids=batch, labels=batch).loss.backward()
    wanted = {n: p.grad * (p != 0) if n in names else p.grad for n, p in twin.named_parameters() if p.grad is not None}
    norm = torch.stack([g.norm() for g in wanted.values()]).norm()
    given = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        optim="sgd",
        max_steps=1,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.5,
        per_device_train_batch_size=2,
    )
    data = [{"input_ids": row, "labels": row} for row in batch]
    zeros = Zeros(model, names, True)
    Distiller(teacher=None, loss=LossSpec(alpha=0), zeros=zeros, model=model, args=given, train_dataset=data).train()
    for name, weight in weights(model).items():
        step = 0.1 * wanted[name] * (0.5 / norm)
        assert torch.allclose(before[name] - weight, step, rtol=1e-2, atol=1e-7), name


def test_only_a_share_that_is_no_accident_stays() -> None:
    model, names = pruned(0.02)
    more = model.get_parameter(names[0])
    with torch.no_grad():
        more[: len(more) // 2] = 0
    assert [one.name for one in Zeros(model, names, "auto").report(model)] == names[:1]
    assert [one.name for one in Zeros(model, names, True).report(model)] == names
    assert not Zeros(model, names, False) and Zeros(model, names, True)


def test_a_weight_that_is_there_again_is_told() -> None:
    model, names = pruned()
    zeros = Zeros(model, names, "auto")
    weight = model.get_parameter(names[2])
    with torch.no_grad():
        weight[tuple((weight == 0).nonzero()[0].tolist())] = 1e-9
        weight.view(-1)[weight.flatten().nonzero()[-1]] = 0  # the number of zeros is the same
    with pytest.raises(GateError, match=f"{names[2]}: 1 weights that were pruned"):
        zeros.report(model)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_processes_keep_the_same_zeros(tmp_path: Path, how: str) -> None:
    script = Path(__file__).parent / "shared_zeros.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(llmshrink.__file__).parents[1])}
    subprocess.run([*command, how, str(tmp_path)], check=True, env=env)
    one, other = (torch.load(tmp_path / f"{how}-{rank}.pt") for rank in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    for name in ("0.weight", "2.weight"):
        assert int((one[name] == 0).sum()) == one[name].numel() // 2
