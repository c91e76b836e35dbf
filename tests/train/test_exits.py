"""Early layers taught by the last one: the model's own norm and head in every family, and whole logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, config
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments

from llmshrink.model.task import task_of
from llmshrink.recipe.distill import LossSpec
from llmshrink.train import trainer as module
from llmshrink.train.heads import Halves
from llmshrink.train.losses import divergence, mixed
from llmshrink.train.trainer import Distiller

CAUSAL = [family for family in FAMILIES if task_of(config(family)).causal]


@pytest.mark.parametrize("family", CAUSAL)
def test_the_tail_is_what_stands_behind_the_blocks(family: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(family)).eval()
    ids, halves, seen = torch.randint(3, 100, (2, 12)), Halves(model), []
    handle = halves._blocks[-1].register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        wanted = halves.body(model, {"input_ids": ids})
        handle.remove()
        state = seen[0] if isinstance(seen[0], Tensor) else seen[0][0]
        found = torch.cat([halves.tail(part) for part in state.split(5, dim=1)], dim=1)
        again = halves.body(model, {"input_ids": ids})
    assert torch.allclose(found, wanted, atol=1e-5) and torch.equal(again, wanted)


def deep(seed: int, **more: object) -> PreTrainedModel:
    torch.manual_seed(seed)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config("llama", num_hidden_layers=4, **more))
    return made


def rows() -> dict[str, Tensor]:
    ids = torch.randint(3, 100, (3, 20), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :7] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_is_that_of_whole_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    monkeypatch.setattr(module, "LOGITS", 3 * 160 * 4 * 4)  # four positions
    model, batch, spec = deep(0, tie_word_embeddings=tied), rows(), LossSpec(alpha=0.7)
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    made = Distiller(teacher=None, loss=spec, exits=[0, 2], model=model.train(), args=arguments)
    found = made.compute_loss(model, batch, num_items_in_batch=40)
    found.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    out = model(**{k: batch[k] for k in ("input_ids", "attention_mask")}, output_hidden_states=True)
    labels = batch["labels"][:, 1:].flatten()
    last = out.logits[:, :-1].flatten(0, 1)
    early = [model.lm_head(model.model.norm(out.hidden_states[n + 1]))[:, :-1].flatten(0, 1) for n in (0, 2)]
    wanted = mixed(last, None, labels, spec) + sum(mixed(one, last.detach(), labels, spec) for one in early) / 2
    (wanted / 40).backward()
    assert float(found.detach()) == pytest.approx(float(wanted.detach()) / 40, rel=1e-4)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.allclose(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5), (
            name
        )
    with torch.no_grad():
        held = made.compute_loss(model.eval(), batch)
        each = [divergence(one, last, LossSpec(temperature=1.0))[labels != -100].mean() for one in early]
    assert float(held) == pytest.approx(float(sum(each)) / 2, rel=1e-4)
