"""Ranks that move to where they help (AdaLoRA, Zhang et al. 2023, arXiv 2303.10512), so that a run can go on."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SUMS = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of importance, as peft calls them
PATTERN = "rank_pattern"


class Ranks(TrainerCallback):  # type: ignore[misc] # it has no types
    """Moves ranks after each step, and knows what peft keeps in memory alone: importance, and what is masked."""

    def __init__(self, model: PeftModel) -> None:
        self._tuner = model.base_model
        self._config = model.peft_config["default"]
        self._weight = float(self._config.orth_reg_weight)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """From here on `pull` counts what peft would add to the loss of every batch, however many a step has."""
        self._config.orth_reg_weight = 0.0

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The settings are written as they were."""
        self._config.orth_reg_weight = self._weight

    def pull(self) -> Tensor:
        """How far the outer factors are from orthogonal, weighed, [] (equation 4; as in peft the norm, not its square).

        It is the mean of |A A^T - I| and |B^T B - I| over all factors A [rank, in] and B [out, rank].
        """
        found = []
        for name, factor in self._tuner.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                gram = factor @ factor.T if ".lora_A." in name else factor.T @ factor
                found.append((gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)).norm())
        return self._weight * torch.stack(found).mean()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Weights moved, and their gradients are still there."""
        self._tuner.update_and_allocate(state.global_step)

    def state(self) -> dict[str, Tensor]:
        """All that is kept in memory alone."""
        found = {
            f"{kind}/{name}": tensor
            for kind in SUMS
            for name, tensor in getattr(self._tuner.rankallocator, kind).items()
        }
        kept = self._config.rank_pattern or {}
        return found | {f"{PATTERN}/{name}": torch.tensor(ranks) for name, ranks in kept.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from it."""
        parts: dict[str, dict[str, Any]] = {kind: {} for kind in (*SUMS, PATTERN)}
        for key, tensor in state.items():
            kind, _, name = key.partition("/")
            parts[kind][name] = tensor.tolist() if kind == PATTERN else tensor
        for kind in SUMS:
            setattr(self._tuner.rankallocator, kind, parts[kind])
        self._config.rank_pattern = parts[PATTERN] or None
