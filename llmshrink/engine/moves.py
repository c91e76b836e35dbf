"""The small parameters of a compressed model that lies in shards: its scales, the weights of norms, biases.

Codes stay. Each number is learned as how far it moves from what is stored, a scale as a share of itself, a vector in
its root mean square; and it is rounded to what it is stored in at every step, with gradients that pass through the
rounding (Bengio et al. 2013, arXiv 1308.3432), so that what is learned is what is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmshrink.engine.shards import Shards
from llmshrink.forms import Dense, Layer, Quantized, on
from llmshrink.model.anatomy import Block, Matrix, Part
from llmshrink.model.rounding import as_stored
from llmshrink.model.streamed import Decoded
from llmshrink.plan.work import Work


@dataclass
class Moves:
    """How far each table of scales, by the matrix's key, and each vector has moved: float32 leaves."""

    scales: dict[str, Tensor]
    vectors: dict[str, Tensor]

    @classmethod
    def none(cls, work: Work) -> Moves:
        """Where learning starts."""
        device = work.model.device

        def zeros(shape: tuple[int, ...]) -> Tensor:
            return torch.zeros(shape, device=device).requires_grad_()

        scales = {m.key: zeros(shape) for m, shape in work.scale_shapes.items()}
        return cls(scales, {key: zeros(work.model.weights.infos[key].shape) for key in work.vectors})

    @property
    def all(self) -> dict[str, Tensor]:
        """Both; no matrix has the key of a vector."""
        return {**self.scales, **self.vectors}


class Moved:
    """A model in shards whose small parameters have moved, block by block (`backward.Blocks`)."""

    def __init__(self, work: Work, shards: Shards, moves: Moves) -> None:
        self._work, self._model, self._shards, self.moves = work, work.model, shards, moves
        self._made: dict[str, Tensor] = {}  # of the loaded block, with the graph to the moves

    @property
    def outside(self) -> list[str]:
        """Vectors that belong to no block."""
        return [key for key in self._model.vectors(self._model.anatomy.others) if key in self.moves.vectors]

    def load(self, index: int) -> dict[str, Tensor]:
        """Put a block into memory; what has moved in it comes back as leaves, float32."""
        block = self._model.anatomy.blocks[index]
        decoded = self._shards.written(block)
        with torch.enable_grad():
            self._made = dict(self._weights(block)) | {key: self.vector(key) for key in self._vectors(block)}
        leaves = {key: made.detach().requires_grad_() for key, made in self._made.items()}
        for key, leaf in leaves.items():  # the block's own parameters lie in the same memory
            scheme = decoded[key].input if key in decoded else None
            decoded[key] = Decoded(leaf.detach, scheme)
        self._model.load_block(index, decoded)
        return leaves

    def collect(self, index: int, leaves: Mapping[str, Tensor]) -> None:
        """Hand the leaves' gradients on to the moves, and add them up there."""
        reached = [key for key, leaf in leaves.items() if leaf.grad is not None]  # not experts that no token went to
        torch.autograd.backward([self._made[key] for key in reached], [leaves[key].grad for key in reached])

    def drop(self, index: int) -> None:
        """Take a block out of memory."""
        self._made = {}
        self._model.drop_block(index)

    def vector(self, key: str) -> Tensor:
        """A vector as it is written, float32; gradients reach its move."""
        stored = self._model.weights.dense(key).to(self._model.device)
        exact = stored.float()
        unit = float(exact.square().mean().sqrt())  # zero of a bias that says nothing: it stays so
        return as_stored(exact + unit * self.moves.vectors[key], stored.dtype)

    def changed(self, part: Part) -> dict[str, Tensor]:
        """The tensors of a part, by their names on disk, that are others than in its shard."""
        get = self._shards.reader(part)
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            for matrix, form in self._forms(part, get):
                scale = Dense(self._scale(matrix, form).to(_stored(form).dtype))
                slot, fmt = self._work.slots[matrix], self._work.format
                scheme = fmt.unpack_input(slot, get, self._work.quantization_config)
                found |= fmt.pack(slot, Layer(replace(form, scale=scale), input=scheme))
            for key in self._vectors(part):
                found[key] = self.vector(key).to(self._model.weights.infos[key].dtype)
        return {name: made.cpu() for name, made in found.items() if not torch.equal(made.cpu(), get(name))}

    def _vectors(self, part: Part) -> list[str]:
        return [key for key in part.keys if key in self.moves.vectors]

    def _forms(self, part: Part, get: Callable[[str], Tensor]) -> Iterator[tuple[Matrix, Quantized]]:
        for matrix in part.matrices:
            if matrix.key in self.moves.scales:
                form = self._shards.form(matrix, get)
                assert isinstance(form, Quantized)
                yield matrix, on(form, self._model.device)

    def _weights(self, block: Block) -> Iterator[tuple[str, Tensor]]:
        for matrix, form in self._forms(block, self._shards.reader(block)):
            assert not isinstance(form.block, int)
            steps = form.codes.float().view(len(form.codes), -1, form.block[1])
            if form.zero is not None:
                steps -= form.zero.float()[..., None]
            yield matrix.key, (steps * self._scale(matrix, form)[..., None]).view(form.codes.shape)

    def _scale(self, matrix: Matrix, form: Quantized) -> Tensor:
        stored = _stored(form)
        return as_stored(stored.float() * (1 + self.moves.scales[matrix.key]), stored.dtype)


def _stored(form: Quantized) -> Tensor:
    assert isinstance(form.scale, Dense)
    return form.scale.weight
