"""A source whose head is tied to its embedding, seen as if the head had a tensor of its own with the same values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from llmshrink.io.safetensors import Checkpoint
from llmshrink.model.source import Source

TIED = "tie_word_embeddings"


@dataclass(frozen=True)
class Untied(Source):
    """The same model with one tensor more."""

    embedding: str  # the tensor's name on disk
    head: str  # and what the head's is called

    @cached_property
    def config_dict(self) -> dict[str, Any]:
        """The configuration, which says that the head has a tensor of its own."""
        return {**Source(self.id, self.folder, self.commit).config_dict, TIED: False}

    @cached_property
    def config(self) -> PretrainedConfig:
        """The same, as transformers understands it."""
        config = Source(self.id, self.folder, self.commit).config
        config.tie_word_embeddings = False
        return config

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The weights, mapped; the head's are the embedding's."""
        return _Copied(Checkpoint.open(self.folder), self.embedding, self.head)


class _Copied(Checkpoint):
    """A checkpoint in which one tensor has a second name."""

    def __init__(self, own: Checkpoint, name: str, copy: str) -> None:
        super().__init__(own.folder, {**own.infos, copy: own.infos[name]})
        self._own, self._name, self._copy = own, name, copy

    def get(self, name: str) -> Tensor:
        """One tensor by either name."""
        return self._own.get(self._name if name == self._copy else name)

    @property
    def bytes(self) -> int:
        """Bytes of the tensors that there are."""
        return self._own.bytes
