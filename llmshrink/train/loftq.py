"""LoftQ: four bits and a product of two thin matrices that together are near a matrix, before anything is learned.

From A = B = 0, in turn: Q takes what B A leaves of W, rounded to NF4, and B A the first singular vectors of what Q
leaves of W (Li et al. 2023, arXiv 2310.08659, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from bitsandbytes.nn import Params4bit
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from llmshrink.forms import decode
from llmshrink.methods.base import Prepared
from llmshrink.methods.nf4 import BnbConfig, Nf4


@dataclass(frozen=True)
class Begun:
    """What one matrix begins as: rounded [out, in] float32, up [out, rank], down [rank, in]."""

    rounded: Tensor
    up: Tensor
    down: Tensor


def begun(weight: Tensor, rank: int, iterations: int) -> Begun:
    """The codes, decoded, and the product of one matrix.

    Args:
        weight: [out, in], floats.
        rank: of the product.
        iterations: how often both are fitted to each other; the best of them is taken.
    """
    whole = weight.float()
    method, product = Nf4(BnbConfig()), torch.zeros_like(whole)
    best: tuple[float, Begun] | None = None
    for _ in range(iterations):
        rounded = decode(method.compress(whole - product, Prepared()).weight)
        left, values, right = torch.linalg.svd(whole - rounded, full_matrices=False)
        root = values[:rank].sqrt()
        found = Begun(rounded, (left[:, :rank] * root).contiguous(), (root[:, None] * right[:rank]).contiguous())
        product = found.up @ found.down
        error = float((whole - rounded - product).norm())
        if best is None or error < best[0]:
            best = error, found
    assert best is not None
    return best[1]


def begin(base: PreTrainedModel, weights: Iterable[tuple[str, Tensor]], rank: int, iterations: int) -> dict[str, Begun]:
    """Let linears in four bits begin as the codes of LoftQ.

    Args:
        base: loaded as NF4, with scales in float32; its codes are replaced.
        weights: names of its linears, with their weights [out, in] as they were before.
        rank: of the products.
        iterations: as for `begun`.

    Returns:
        What each begins as, by its name.
    """
    found = {}
    for name, weight in weights:
        found[name] = one = begun(weight, rank, iterations)
        linear = base.get_submodule(name)
        codes = Params4bit(one.rounded, requires_grad=False, quant_type="nf4", compress_statistics=False)
        linear.weight = codes.to(weight.device)  # which rounds: what is rounded stays as it is
    return found


@torch.no_grad()
def place(model: PeftModel, found: Mapping[str, Begun]) -> None:
    """Put the products where peft multiplies them by its own factor."""
    for name, one in found.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        root = layer.scaling["default"] ** 0.5
        layer.lora_A["default"].weight.copy_(one.down / root)
        layer.lora_B["default"].weight.copy_(one.up / root)
