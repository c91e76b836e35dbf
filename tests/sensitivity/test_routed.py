"""What experts are worth against each token's router weights and expert outputs, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import load
from torch import Tensor, nn

from llmshrink.engine.hidden import Hidden
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.sensitivity.routed import routed


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_it_is_the_mean_size_of_what_is_added(models_folder: Callable[..., Path], family: str) -> None:
    folder = models_folder(family)
    tokens = torch.randint(0, 160, (4, 16), generator=torch.Generator().manual_seed(3))
    plain = load(folder)[0]
    module = next(m for m in plain.model.layers[0].modules() if hasattr(m, "gate_up_proj"))
    calls: list[tuple[Tensor, ...]] = []
    module.register_forward_pre_hook(lambda _, args: calls.append(args))
    plain(tokens)
    ((hidden, index, weights),) = calls
    sums, counts = torch.zeros(4), torch.zeros(4)
    for x, chosen, shares in zip(hidden, index, weights, strict=True):
        for expert, share in zip(chosen.tolist(), shares, strict=True):
            gate, up = (module.gate_up_proj[expert] @ x).chunk(2)
            sums[expert] += share * (module.down_proj[expert] @ (nn.functional.silu(gate) * up)).norm()
            counts[expert] += 1

    model = StreamedModel(open_source(str(folder)), torch.device("cpu"))
    states = Hidden(model, list(tokens.split(2)))
    model.load_block(0)
    found, seen = routed(model, model.anatomy.blocks[0], states, 4)
    assert torch.equal(seen.float(), counts)
    assert torch.allclose(found.float(), sums / counts.clamp(min=1), rtol=1e-4)
    assert not any(hasattr(m, "witness") for m in model.model.modules())
