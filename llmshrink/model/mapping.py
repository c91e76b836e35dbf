"""Which tensors on disk make which parameter in memory, by transformers' own loading rules.

Most parameters are one tensor under its own name; some are renamed (GPT-NeoX's head), some are built from many
(Qwen3-MoE stacks its experts into one 3-D parameter). Compression works on what is on disk, so that the output has the
names the source had; `build` then makes the parameter in memory from the decoded matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


@dataclass(frozen=True)
class Origin:
    """Where a parameter comes from: its tensors on disk, with the pattern each matched if a converter joins them."""

    keys: tuple[str, ...]
    patterns: tuple[str | None, ...]


class WeightMap:
    """The map between a checkpoint's names and a model's."""

    def __init__(self, model: PreTrainedModel, keys: Iterable[str]) -> None:
        self._model = model
        rules = get_model_conversion_mapping(model)
        renamings = [r for r in rules if isinstance(r, WeightRenaming)]
        converters = [r for r in rules if isinstance(r, WeightConverter)]
        self._by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        state = model.state_dict()
        found: dict[str, list[tuple[str, str | None]]] = {}
        self.unused: list[str] = []  # on disk, but no parameter takes them
        for key in sorted(keys, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
            if name in state:
                found.setdefault(name, []).append((key, pattern))
            else:
                self.unused.append(key)
        self.origins = {
            name: Origin(tuple(k for k, _ in pairs), tuple(p for _, p in pairs)) for name, pairs in found.items()
        }
        tied: dict[str, Any] = getattr(model, "all_tied_weights_keys", None) or {}
        missing = sorted(name for name in state if name not in self.origins and name not in tied)
        # Many encoders are saved without their pooler: their hidden states do not depend on it.
        self.absent = [name for name in missing if name.startswith("pooler.")]
        self.missing = [name for name in missing if name not in self.absent]

    def joined(self, name: str) -> bool:
        """Whether a parameter is built from several tensors, or from one that is changed on the way."""
        return any(pattern is not None for pattern in self.origins[name].patterns)

    def build(self, name: str, get: Callable[[str], Tensor]) -> Tensor:
        """The parameter `name` in memory, from tensors that `get` returns by their name on disk."""
        origin = self.origins[name]
        if not self.joined(name):
            return get(origin.keys[0])
        pattern = origin.patterns[0]
        assert pattern is not None
        rule = deepcopy(self._by_pattern[pattern])
        for key, source_pattern in zip(origin.keys, origin.patterns, strict=True):
            rule.add_tensor(name, key, source_pattern, get(key))
        built: dict[str, Any] = rule.convert(name, model=self._model, config=self._model.config)
        value = built[name]
        tensor: Tensor = value[0] if isinstance(value, list) else value
        return tensor
