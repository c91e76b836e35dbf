"""What AdaLoRA asks of its factors: peft's own term, once in a step, and not in the loss that is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from tiny import build_model, config
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainingArguments

from llmshrink.train.adalora import Ranks
from llmshrink.train.data import collate
from llmshrink.train.learner import Learner


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adalora") / "model"
    build_model(path, config("llama"))
    return path


def adapted(folder: Path) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(5)
    wanted = AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_r=4, target_r=2, total_step=90, tinit=30
    )
    return get_peft_model(base, wanted)


def rows(count: int) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 100, (count, 9), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def learned(folder: Path, out: Path, batch: int, accumulate: int) -> tuple[float, list[Tensor], PeftModel]:
    """What is told of one step, and the gradients that it took."""
    model, seen = adapted(folder), list[Tensor]()
    given = TrainingArguments(
        output_dir=str(out),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        max_steps=1,
        logging_steps=1,
        max_grad_norm=0,
    )
    ranks = Ranks(model)
    learner = Learner(
        model=model, args=given, beside=ranks, callbacks=[ranks], train_dataset=rows(4), data_collator=collate
    )
    ranks.on_optimizer_step = lambda *_, **__: seen.extend(p.grad.clone() for p in _learns(model))  # type: ignore[method-assign,misc]
    learner.train()
    return learner.state.log_history[0]["loss"], seen, model


def _learns(model: PeftModel) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def test_the_term_is_that_of_peft_counted_once_and_not_told(folder: Path, tmp_path: Path) -> None:
    model, batch = adapted(folder).train(), collate(rows(4))
    whole = model(**batch).loss  # peft adds its term where it finds labels
    right = torch.autograd.grad(whole, _learns(model))
    model.peft_config["default"].orth_reg_weight = 0.0
    text = model(**batch).loss.item()
    assert whole.item() - text > 0.1
    for size, accumulate in ((4, 1), (1, 4)):
        told, found, after = learned(folder, tmp_path, size, accumulate)
        assert told == pytest.approx(text, rel=1e-4)
        assert after.peft_config["default"].orth_reg_weight == 0.5
        assert len(found) == len(right)
        for one, other in zip(found, right, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
