"""Which matrices share a tensor: those of one name in adjacent blocks, where their method says so."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

from llmshrink.methods.base import Method
from llmshrink.methods.basis import Place, Sharing
from llmshrink.model.anatomy import Block, Matrix


def stacks(methods: Mapping[Matrix, Method[Any]], blocks: Iterable[Block]) -> Iterator[tuple[Matrix, ...]]:
    """Matrices that share, two at least: of one name, shape, dtype and settings in blocks n k to n (k + 1) - 1.

    Experts do not: one of a block is no more like that of the same number in the next than like any other.
    """
    found: dict[Hashable, list[Matrix]] = {}
    for block in blocks:
        for matrix in block.matrices:
            method = methods.get(matrix)
            if isinstance(method, Sharing) and method.config.blocks > 1 and matrix.site.expert is None:
                name, many = matrix.parameter.removeprefix(block.prefix), method.config.blocks
                key = (block.index // many, name, matrix.shape, matrix.dtype, method.config)
                found.setdefault(key, []).append(matrix)
    return (tuple(matrices) for matrices in found.values() if len(matrices) > 1)


def placed(methods: Mapping[Matrix, Method[Any]], blocks: Iterable[Block]) -> dict[Matrix, Method[Any]]:
    """The methods, of which those of matrices that share know their places."""
    found = dict(methods)
    for matrices in stacks(methods, blocks):
        for number, matrix in enumerate(matrices):
            method = methods[matrix]
            assert isinstance(method, Sharing)
            found[matrix] = method.at(Place(matrices[0].name, number, len(matrices)))
    return found
