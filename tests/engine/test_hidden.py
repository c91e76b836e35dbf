"""States between blocks, and the arguments that blocks are called with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmshrink.engine.hidden import Hidden
from llmshrink.model.capture import Record
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel

BATCHES = [torch.full((2, 6), n) for n in (1, 2, 2)]


@pytest.fixture
def model(models_folder: Callable[..., Path]) -> StreamedModel:
    return StreamedModel(open_source(str(models_folder("llama"))), torch.device("cpu"))


def test_arguments_that_follow_from_the_shape_are_kept_once(model: StreamedModel) -> None:
    hidden = Hidden(model, BATCHES)
    assert len({id(record) for record in hidden._records}) == 1


def test_arguments_that_depend_on_the_tokens_are_kept_for_each_batch(
    model: StreamedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = model.record

    def masked(tokens: Tensor) -> Record:
        """As if this family let a position see only as many before it as its token says."""
        found, length = record(tokens), tokens.shape[1]
        distance = torch.arange(length)[:, None] - torch.arange(length)
        mask = (distance >= 0) & (distance < tokens[0, 0])
        return Record(found.hidden, tuple((a, {**k, "attention_mask": mask[None, None]}) for a, k in found.arguments))

    monkeypatch.setattr(model, "record", masked)
    hidden = Hidden(model, BATCHES)
    model.load_block(0)
    for batch, tokens in enumerate(BATCHES):
        expected = model.run(0, masked(tokens), hidden.states[batch])
        assert torch.equal(hidden.run(0, batch), expected)
    hidden.forget(1)
    assert torch.equal(hidden.run(0, 0), model.run(0, masked(BATCHES[1]), hidden.states[0]))
