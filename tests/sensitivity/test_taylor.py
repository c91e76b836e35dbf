"""Worth by gradients against gates in the plain model: the derivative of each row's loss by a factor on each thing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import load
from torch import nn

from llmshrink.engine.hidden import Hidden
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.sensitivity.taylor import Taylor


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(("family", "reader", "things"), [("llama", "mlp.down_proj", 128), ("gpt2", "mlp.c_proj", 256)])
def test_it_is_the_mean_square_of_the_derivatives_by_gates(
    models_folder: Callable[..., Path], tmp_path: Path, family: str, reader: str, things: int, on_disk: bool
) -> None:
    folder = models_folder(family)
    tokens = torch.randint(0, 160, (5, 12), generator=torch.Generator().manual_seed(3))
    model = StreamedModel(open_source(str(folder)), torch.device("cpu"))
    readers = {
        (block.index, "neurons"): (next(m for m in block.matrices if m.name.endswith(reader)), things)
        for block in model.anatomy.blocks
    }
    states = tmp_path if on_disk else None
    found = Taylor(model, readers, logits=1 << 12).run(Hidden(model, list(tokens.split([3, 2]))), states)

    plain = load(folder)[0]
    for (index, _), worth in found.items():
        module = next(m for name, m in plain.named_modules() if name.endswith(f"{index}.{reader}"))
        squares = torch.zeros(things)
        for row in tokens:
            gate = torch.ones(things, requires_grad=True)
            hook = module.register_forward_pre_hook(lambda _, args, gate=gate: (args[0] * gate,))
            logits = plain(row[None]).logits[0]
            hook.remove()
            nn.functional.cross_entropy(logits[:-1], row[1:], reduction="sum").backward()
            assert gate.grad is not None
            squares += gate.grad.square()
        assert torch.allclose(worth.float(), squares / len(tokens), rtol=1e-3, atol=1e-6)


def test_rows_of_other_lengths_are_rows_too(models_folder: Callable[..., Path]) -> None:
    model = StreamedModel(open_source(str(models_folder("opt"))), torch.device("cpu"))  # some linears get [tokens, in]
    readers = {(0, "neurons"): (next(m for m in model.anatomy.blocks[0].matrices if m.name.endswith("fc2")), 64)}
    short, long = (torch.randint(0, 160, (2, n), generator=torch.Generator().manual_seed(n)) for n in (6, 12))
    both = Taylor(model, readers, 1 << 20).run(Hidden(model, [short, long]), None)[0, "neurons"]
    each = [Taylor(model, readers, 1 << 20).run(Hidden(model, [one]), None)[0, "neurons"] for one in (short, long)]
    assert torch.allclose(both, sum(each) / 2, rtol=1e-4)


def test_columns_of_one_thing_are_summed_first(models_folder: Callable[..., Path]) -> None:
    model = StreamedModel(open_source(str(models_folder("llama"))), torch.device("cpu"))
    matrix = next(m for m in model.anatomy.blocks[0].matrices if m.name.endswith("o_proj"))
    tokens = torch.randint(0, 160, (1, 8), generator=torch.Generator().manual_seed(5))
    each = Taylor(model, {(0, "a"): (matrix, matrix.shape[1])}, 1 << 20).run(Hidden(model, [tokens]), None)
    pairs = Taylor(model, {(0, "a"): (matrix, 1)}, 1 << 20).run(Hidden(model, [tokens]), None)
    assert float(pairs[0, "a"]) != pytest.approx(float(each[0, "a"].sum()), rel=1e-3)
    assert float(pairs[0, "a"]) <= (float(each[0, "a"].sqrt().sum()) * 1.001) ** 2
