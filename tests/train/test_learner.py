"""A step is the same in one batch or in several, whatever the model itself divides its loss by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from tiny import config
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainingArguments

from llmshrink.train.adalora import Ranks
from llmshrink.train.learner import Learner

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
ROWS = torch.randint(3, 100, (4, 12), generator=torch.Generator().manual_seed(2))


def classes(batches: int) -> tuple[Any, dict[str, Any]]:
    made = AutoModelForSequenceClassification.from_config(config("llama", num_labels=3, pad_token_id=0, **SMALL))
    data = [{"input_ids": row, "labels": i % 3} for i, row in enumerate(ROWS)]
    return made, {"classes": True, "train_dataset": data}


def moving_ranks(batches: int) -> tuple[Any, dict[str, Any]]:
    base = AutoModelForCausalLM.from_config(config("llama", **SMALL))
    wanted = AdaLoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "down_proj"],
        total_step=10,
        tinit=2,
        tfinal=2,
        target_r=2,
        init_r=3,
    )
    made = get_peft_model(base, wanted)
    moving = Ranks(made)
    data = [{"input_ids": row, "labels": row} for row in ROWS]
    return made, {"beside": moving, "callbacks": [moving], "train_dataset": data}


@pytest.mark.parametrize("kind", [classes, moving_ranks])
def test_a_step_is_the_same_in_any_number_of_batches(kind: Any, tmp_path: Path) -> None:
    found: list[dict[str, Tensor]] = []
    for batches in (1, 2, 4):
        torch.manual_seed(0)
        model, given = kind(batches)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            optim="sgd",
            max_steps=1,
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            per_device_train_batch_size=4 // batches,
            gradient_accumulation_steps=batches,
        )
        Learner(model=model, args=arguments, **given).train()
        after = dict(model.named_parameters())
        found.append({name: after[name].detach() - value for name, value in before.items()})
    first, *others = found
    assert max(float(step.abs().max()) for step in first.values()) > 1e-3
    for other in others:
        assert all(torch.allclose(other[name], step, rtol=1e-3, atol=1e-5) for name, step in first.items())
    if kind is moving_ranks:
        assert model.peft_config["default"].orth_reg_weight == 0.5  # as it is written
