"""Gradients by block against those of the whole model at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmshrink.engine.backward import backward
from llmshrink.engine.hidden import Hidden
from llmshrink.model.source import open_source
from llmshrink.model.streamed import Decoded, StreamedModel

FAMILIES = ["llama", "gpt2", "qwen3-moe", "gemma2", "gpt-neox"]


class Weights:
    """All matrices and vectors of a model's blocks as leaves; their gradients are added up."""

    def __init__(self, model: StreamedModel) -> None:
        self.model = model
        self.found: dict[str, Tensor] = {}
        self.loaded: list[int] = []

    def load(self, index: int) -> dict[str, Tensor]:
        block, model = self.model.anatomy.blocks[index], self.model
        leaves = {m.key: model.read(m).float().clone() for m in block.matrices}
        leaves |= {key: model.weights.get(key).float().clone() for key in model.vectors(block.keys)}
        self.loaded.append(index)
        model.load_block(index, {key: Decoded(lambda leaf=leaf: leaf) for key, leaf in leaves.items()})
        return {key: leaf.requires_grad_() for key, leaf in leaves.items()}

    def collect(self, index: int, leaves: Mapping[str, Tensor]) -> None:
        assert not self.found.keys() & leaves.keys()
        self.found |= {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}

    def drop(self, index: int) -> None:
        self.model.drop_block(index)


def streamed(folder: Path) -> StreamedModel:
    return StreamedModel(open_source(str(folder)), torch.device("cpu"))


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_whole_model(
    models_folder: Callable[..., Path], tmp_path: Path, family: str, on_disk: bool
) -> None:
    """Of every matrix and vector in the blocks, and of what lies behind them."""
    model = streamed(models_folder(family))
    tokens = torch.randint(3, 100, (4, 12), generator=torch.Generator().manual_seed(1))
    batches = list(tokens.split(2))
    direction = torch.randn(4, 12, model.width, generator=torch.Generator().manual_seed(2))
    outside = {
        key: model.weights.get(key).float().clone().requires_grad_() for key in model.vectors(model.anatomy.others)
    }

    def head(batch: int, state: Tensor) -> tuple[float, Tensor]:
        leaf = state.detach().clone().requires_grad_()
        out = (model.output(batches[batch], leaf, outside).tanh() * direction.split(2)[batch]).sum()
        out.backward()
        assert leaf.grad is not None
        return out.item(), leaf.grad

    weights, folder = Weights(model), tmp_path if on_disk else None
    loss = backward(Hidden(model, batches, folder=folder), weights, head, folder)
    depth = len(model.anatomy.blocks)
    assert weights.loaded == [*range(depth), *reversed(range(depth))]

    whole = model.whole().float().requires_grad_()
    expected = (whole(tokens).logits.tanh() * direction).sum()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    parameters = dict(whole.named_parameters())
    found = {**weights.found, **{key: leaf.grad for key, leaf in outside.items() if leaf.grad is not None}}
    checked = 0
    for name, origin in model.map.origins.items():
        gradient = parameters[name].grad if name in parameters else None
        if gradient is None or not any(key in found for key in origin.keys):
            continue
        matrices = {m.key: m for m in model.anatomy.matrices}
        zeros = {key: torch.zeros(model.weights.infos[key].shape) for key in origin.keys}
        own = {
            key: matrices[key].seen(found[key]) if key in matrices and key in found else found.get(key, zeros[key])
            for key in origin.keys
        }
        made = model.map.build(name, own.__getitem__)
        torch.testing.assert_close(made.float(), gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))
        checked += 1
    assert checked >= 6 * depth and outside
