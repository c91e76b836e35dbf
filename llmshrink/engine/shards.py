"""What the shards of a run hold and mean: the engine goes on with what is on disk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor

from llmshrink.engine.groups import GroupCompressor
from llmshrink.forms import Form
from llmshrink.io import safetensors
from llmshrink.model.anatomy import Matrix, Part
from llmshrink.model.streamed import Decoded
from llmshrink.plan.work import Work


class Shards:
    """The finished parts of a run.

    Attributes:
        replaced: Tensors by their names on disk that count in place of what a shard holds.
    """

    def __init__(self, work: Work, groups: GroupCompressor, folder: Path) -> None:
        self._work, self._groups, self._folder = work, groups, folder
        self.replaced: dict[str, Tensor] = {}

    def open(self, part: Part) -> safetensors.Checkpoint:
        """The file of a part as it was written."""
        path = self._folder / self._work.shards[part.index]
        return safetensors.Checkpoint(path.parent, safetensors.read_header(path))

    def reader(self, part: Part) -> Callable[[str], Tensor]:
        """What gives the tensors of a part, and those of others that it needs."""
        lenders = (other for other in self._work.parts if other.index in self._work.lenders(part))
        opened = [*map(self.open, lenders), self.open(part)]
        infos = {name: info for checkpoint in opened for name, info in checkpoint.infos.items()}
        checkpoint = safetensors.Checkpoint(self._folder, infos)

        def get(name: str) -> Tensor:
            # A copy: what is computed with must not lie in a mapped file, nor be aligned otherwise than when made.
            return (self.replaced[name] if name in self.replaced else checkpoint.get(name)).clone()

        return get

    def form(self, matrix: Matrix, get: Callable[[str], Tensor]) -> Form:
        """What is stored of a compressed matrix."""
        return self._work.format.unpack(self._work.slots[matrix], get, self._work.quantization_config)

    def written(self, part: Part) -> dict[str, Decoded]:
        """What stands for the matrices of a part that were compressed, and for what was replaced."""
        get, decoded = self.reader(part), self.opened(part)
        for matrix in part.matrices:
            if matrix in self._work.methods:
                decoded[matrix.key] = self._groups.decoded(self._work.slots[matrix], get)
        for key in set(part.keys) & (self.replaced.keys() | self._work.fitted) - decoded.keys():
            decoded[key] = Decoded(partial(get, key))
        return decoded

    def opened(self, part: Part) -> dict[str, Decoded]:
        """Matrices that were compressed and are written dense: rounded to the model's dtype, and so gone on with."""
        weights = self._work.model.weights

        def read(matrix: Matrix) -> Tensor:
            return matrix.seen(weights.dense(matrix.key).float())

        left = [m for m in part.matrices if m not in self._work.methods and m.key in weights.compressed]
        return {matrix.key: Decoded(partial(read, matrix)) for matrix in left}
