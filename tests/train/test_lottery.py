"""Which weights are drawn, against sorting; the rates of a training that begins late."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import config
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainingArguments

from llmshrink.recipe.distill import LossSpec
from llmshrink.recipe.lottery import LotterySpec
from llmshrink.train.lottery import Late, drawn, rewind


def weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (8, 16), "k": (4, 16), "experts": (3, 5, 7)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("whole", [False, True])
def test_masks_nest_and_hold_the_largest(whole: bool) -> None:
    spec, kept = LotterySpec(rounds=3, sparsity=0.7), dict[str, Tensor]()
    for number in range(1, 4):
        trained = weights(number)
        share = 1 - 0.3 ** (number / 3)
        assert spec.share(number) == pytest.approx(share)
        masks = drawn(trained, kept, spec.share(number), whole=whole)
        names = [list(trained)] if whole else [[name] for name in trained]
        for group in names:  # those that have not been dropped, sorted: the smallest go
            entries = [(n, i) for n in group for i in range(trained[n].numel())]
            left = [(n, i) for n, i in entries if n not in kept or bool(kept[n].flatten()[i])]
            left.sort(key=lambda entry: float(trained[entry[0]].abs().flatten()[entry[1]]))
            stay = set(left[len(left) - (len(entries) - round(share * len(entries))) :])
            found = {(n, i) for n, i in entries if bool(masks[n].flatten()[i])}
            assert found == stay
        kept = {name: mask.flatten() for name, mask in masks.items()}


def test_what_is_kept_begins_with_its_early_weights() -> None:
    model = AutoModelForCausalLM.from_config(config("llama"))
    early = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    name = "model.layers.1.mlp.up_proj.weight"
    mask = torch.rand(early[name].numel()) < 0.3
    rewind(model, early, {name: mask})
    for other, parameter in model.named_parameters():
        wanted = early[other] * mask.view(early[name].shape) if other == name else early[other]
        assert torch.equal(parameter, wanted), other


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_rates_go_on_from_the_step_that_is_gone_back_to(tmp_path: Path, schedule: str) -> None:
    found = []
    for begun in (0, 3):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to="none",
            learning_rate=0.5,
            lr_scheduler_type=schedule,
            warmup_steps=4,
            max_steps=12 - begun,
        )
        model = AutoModelForCausalLM.from_config(config("llama"))
        late = Late(begun=begun, teacher=None, loss=LossSpec(alpha=0), model=model, args=arguments)
        late.create_optimizer_and_scheduler(12 - begun)
        rates = []
        for _ in range(12 - begun):
            rates.append(late.optimizer.param_groups[0]["lr"])
            late.optimizer.step()
            late.lr_scheduler.step()
        found.append(rates)
    assert found[0][3:] == pytest.approx(found[1], rel=1e-12)
    assert schedule == "constant" or found[0][0] != found[0][5]
