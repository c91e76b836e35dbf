"""An adapter in the weights: the same function, in a checkpoint that loads without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from llmshrink.io.files import copy_file, write_json
from llmshrink.methods.sparsity import zeros_kept
from llmshrink.model.source import Source
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.zeros import matrices_of


@dataclass(frozen=True)
class Merge:
    """What merging an adapter changed, as the largest differences of logits.

    Attributes:
        spread: Standard deviation of the logits that are meant.
        merged: Of the merged model, in float32, to model and adapter side by side.
        masked: Of it once the zeros of a pruned model are zero again; None: it has none.
        zeros: How many these are.
        rounded: Of what is written in the dtype of the checkpoint.
    """

    spread: float
    merged: float
    masked: float | None
    zeros: int
    rounded: float


def merge(
    model: PeftModel, dtype: torch.dtype, tokens: Tensor, meant: Tensor, zeros: Mapping[str, Tensor]
) -> tuple[PreTrainedModel, Merge]:
    """The model with its adapter in its weights.

    Args:
        model: of floats, in float32; it is changed.
        dtype: that the checkpoint is stored in.
        tokens: ids [rows, length] to try it on.
        meant: what model and adapter give out for these [rows, length, vocabulary].
        zeros: where weights stay zero, bool as these are in memory, by the names of their modules.

    Raises:
        ValueError: a merged weight is no number.
    """
    whole: PreTrainedModel = model.merge_and_unload(safe_merge=True)

    def off() -> float:
        with torch.no_grad():
            rows = [whole(input_ids=row, use_cache=False).logits for row in torch.split(tokens.to(whole.device), 1)]
        return float((torch.cat(rows).float().cpu() - meant).abs().max())

    merged, masked = off(), None
    if zeros:
        with torch.no_grad():
            for name, mask in zeros.items():
                whole.get_parameter(f"{name}.weight").masked_fill_(mask, 0)
        masked = off()
    whole.to(dtype).to(torch.float32)
    found = Merge(float(meant.std()), merged, masked, sum(int(mask.sum()) for mask in zeros.values()), off())
    return whole.to(dtype), found


def pruned(model: StreamedModel, keep: Literal["auto"] | bool) -> dict[str, Tensor]:
    """Where the linears of a model are zero and stay so, as `train.keep_zeros` says, by the names of their modules.

    Among codes zeros are codes like others, and nobody knows which of them were pruned.
    """
    floats = [m for m in matrices_of(model) if m.key not in model.weights.compressed and m.kind in ("linear", "conv1d")]
    found = {m.module: zeros_kept(model.weights.get(m.key), keep) for m in floats}
    return {module: ~kept for module, kept in found.items() if kept is not None}


def save_whole(model: PreTrainedModel, folder: Path, source: Source) -> None:
    """Write a model as a checkpoint of floats with the configuration and the tokenizer of where it came from."""
    model.save_pretrained(folder)
    config = {key: value for key, value in source.config_dict.items() if key != "quantization_config"}
    write_json(folder / "config.json", config)
    for name, path in source.companions.items():
        copy_file(path, folder / name)


def save_merge(found: Merge, path: Path) -> None:
    """Keep what merging changed, for the report."""
    write_json(path, asdict(found))
