"""A body and a head give what the whole model gives, in every family, and its gradients."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, config
from transformers import AutoModelForCausalLM

from llmshrink.model.task import task_of
from llmshrink.train.heads import Halves

CAUSAL = [family for family in FAMILIES if task_of(config(family)).causal]


@pytest.mark.parametrize("family", CAUSAL)
def test_halves_are_the_whole(family: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(family)).eval()
    ids = torch.randint(3, 100, (2, 12))
    halves = Halves(model)
    state = halves.body(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    found = torch.cat([halves.head(part) for part in state.split(5, dim=1)], dim=1)
    wanted = model(input_ids=ids).logits
    assert torch.allclose(found, wanted, atol=1e-5)
    direction = torch.randn_like(wanted)
    gradients = []
    for logits in (found, wanted):
        model.zero_grad()
        (logits * direction).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-3, atol=1e-4), name
