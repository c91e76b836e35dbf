"""Matrices of a group, in the order and the pieces in which they are compressed."""

from __future__ import annotations

import pytest
import torch

from llmshrink.engine import groups
from llmshrink.forms import decode
from llmshrink.methods import load_method
from llmshrink.statistics import Hessian

CPU = torch.device("cpu")


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_matrix_may_be_compressed_in_stretches_of_rows(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used = load_method(method)(load_method(method).Config(bits=4, group_size=32))
    hessian = Hessian(64, CPU)
    hessian.update(torch.randn(200, 64, generator=torch.Generator().manual_seed(1)))
    hessian.finish()
    weight, prepared = torch.randn(50, 64, generator=torch.Generator().manual_seed(2)), used.prepare(hessian)
    whole = groups.compressed(used, weight, prepared)
    monkeypatch.setattr(groups, "STACK", 7 * 64)
    parts = groups.compressed(used, weight, prepared)
    assert (decode(parts.weight) == decode(whole.weight)).float().mean() > 0.99  # sums in another order break ties
    assert (parts.objective is None) == (whole.objective is None)
    if parts.objective and whole.objective:
        assert parts.objective.share == pytest.approx(whole.objective.share, rel=1e-2)
