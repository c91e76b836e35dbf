"""States between blocks, and the arguments that blocks are called with."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmshrink.engine.hidden import Hidden
from llmshrink.memory import anonymous_bytes, trim
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
    other = Hidden(model, BATCHES[:1], BATCHES[1])
    other.forget()
    assert torch.equal(other.run(0, 0), model.run(0, masked(BATCHES[1]), other.states[0]))


def test_states_in_a_file_are_the_same_and_leave_nothing(model: StreamedModel, tmp_path: Path) -> None:
    found = [Hidden(model, BATCHES, folder=folder) for folder in (None, tmp_path)]
    assert not any(tmp_path.iterdir())
    model.load_block(0)
    for hidden in found:
        hidden.advance(0)
    assert all(torch.equal(a, b) for a, b in zip(found[0].states, found[1].states, strict=True))


def test_states_in_a_file_are_no_memory_of_the_process(model: StreamedModel, tmp_path: Path) -> None:
    batches = [torch.zeros(64, 1024, dtype=torch.long)]
    hidden = Hidden(model, batches[:0])
    base = anonymous_bytes()
    hidden = Hidden(model, batches, folder=tmp_path)
    assert hidden.states[0].nbytes >= 16 << 20
    trim()
    assert anonymous_bytes() - base < hidden.states[0].nbytes // 2


def test_a_full_disk_is_told_before_anything_is_mapped(
    model: StreamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left") as caught:
        Hidden(model, BATCHES, folder=tmp_path)
    assert caught.value.filename == str(tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("tokens", "shapes"), [(6, [(1, 6)] * 4), (11, [(1, 6)] * 4), (12, [(2, 6), (2, 6)])])
def test_batches_are_split_between_rows(model: StreamedModel, tokens: int, shapes: list[tuple[int, int]]) -> None:
    """The probe, the last one, is never split."""
    hidden, whole = (Hidden(model, BATCHES[:2], BATCHES[2]) for _ in range(2))
    hidden.split(hidden.within(tokens))
    assert [tuple(batch.shape) for batch in hidden.batches] == shapes
    assert torch.equal(torch.cat(hidden.batches), torch.cat(BATCHES[:2]))
    assert hidden.most_tokens() == (12 if tokens == 12 else 0)
    model.load_block(0)
    for states in (hidden, whole):
        states.advance(0)
    assert torch.allclose(torch.cat(hidden.states), torch.cat(whole.states), atol=1e-6)
    hidden.forget()
    assert len(hidden.states) == 1 and not hidden.batches
