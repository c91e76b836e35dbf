"""LoftQ: codes and product in turn, against what its paper says of them."""

from __future__ import annotations

import torch

from llmshrink.forms import decode
from llmshrink.methods.base import Prepared
from llmshrink.methods.nf4 import BnbConfig, Nf4
from llmshrink.train.loftq import begun


def test_codes_and_product_are_nearer_in_each_turn() -> None:
    """One turn is the best product of what NF4 leaves (Eckart-Young, by singular values); more are never worse."""
    torch.manual_seed(0)
    weight = torch.randn(96, 128) @ torch.diag(torch.linspace(0.1, 3, 128))
    rounded = decode(Nf4(BnbConfig()).compress(weight, Prepared()).weight)
    values = torch.linalg.svdvals((weight - rounded).double())
    errors = []
    for iterations in (1, 2, 5):
        found = begun(weight, 8, iterations)
        errors.append(float((weight - found.rounded - found.up @ found.down).double().norm()))
        again = decode(Nf4(BnbConfig()).compress(found.rounded, Prepared()).weight)
        assert torch.equal(again, found.rounded)  # what is rounded stays as it is
    assert abs(errors[0] - float(values[8:].norm())) < 1e-4
    assert errors[2] <= errors[1] < errors[0] < float(values.norm())
