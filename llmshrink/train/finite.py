"""A loss that is no number ends a training where it happens."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from llmshrink.errors import InputError


def check_number(loss: Tensor, step: int, inputs: dict[str, Any]) -> None:
    """Raise InputError, which names the step and its rows, for a loss [] that is NaN or infinite."""
    if not math.isfinite(float(loss.detach())):
        rows = inputs["input_ids"][:, :8].tolist()
        raise InputError(
            f"The loss of step {step} is no number; its rows begin with the tokens {rows}.",
            hint="Lower train.rate, or train.clip; the last saved state is kept.",
        )
