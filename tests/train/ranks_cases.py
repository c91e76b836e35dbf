"""What several processes do in tests of training together: each function runs in all of them."""

from __future__ import annotations

import os
from typing import Any

import bitsandbytes  # noqa: F401
import compressed_tensors  # noqa: F401
from torch import nn

import llmshrink.job
import llmshrink.run  # noqa: F401
from llmshrink.cli import main
from llmshrink.report.schema import Check
from llmshrink.train.trainer import Distiller


def command(arguments: list[str], signals: dict[str, int] | None = None) -> tuple[int, Any]:
    """A command line, without a foreign reader; gives the classes of what was trained, by the step.

    `signals`: a number of a signal that each of the processes named by their numbers sends itself in its third step.
    """
    llmshrink.job.check_reader = lambda *_: Check(name="reader", passed=True, detail="left out")  # type: ignore[attr-defined]
    seen: list[str] = []
    loss = Distiller.compute_loss

    def noting(self: Distiller, model: nn.Module, *more: Any, **named: Any) -> Any:
        if model.training:
            seen.append(type(model).__name__)
        if len(seen) == 3 and (number := (signals or {}).get(os.environ["RANK"])) is not None:
            seen.append("signal")
            os.kill(os.getpid(), number)
        return loss(self, model, *more, **named)

    Distiller.compute_loss = noting  # type: ignore[method-assign]
    return main(arguments), [name for name in seen if name != "signal"]
