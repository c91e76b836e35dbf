"""Learning through the rounding of what is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from llmshrink.forms import Dense, Quantized
from llmshrink.io import safetensors
from llmshrink.methods.sparsity import kept_before
from llmshrink.model.anatomy import Matrix
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.qat import CODES
from llmshrink.plan.training import Training
from llmshrink.train.distillation import Distillation
from llmshrink.train.rounding import Rounding
from llmshrink.train.trainer import Distiller


class Qat(Distillation):
    """A student whose linears are rounded in every forward pass, and its teacher."""

    def __init__(self, training: Training, student: StreamedModel, start: StreamedModel, device: torch.device) -> None:
        """Load student and teacher, and put the rounding between the student's weights and what uses them.

        Args:
            training: who learns from whom.
            student: as it is before it was rounded.
            start: the same rounded.
            device: where it will be trained.
        """
        super().__init__(training, student, device)
        assert training.stage.qat is not None
        self._scale_rate = training.stage.qat.scale_rate
        rounded = [m for block in start.anatomy.blocks for m in block.matrices if m.key in start.weights.compressed]
        keys = {m.parameter: m.key for block in student.anatomy.blocks for m in block.matrices}
        self._originals = {m.parameter: keys[m.parameter] for m in rounded}
        for matrix in rounded:
            form = start.weights.form(matrix.key)
            assert isinstance(form, Quantized)
            self._round(matrix, form)

    def _round(self, matrix: Matrix, form: Quantized) -> None:
        module = self.model.get_submodule(matrix.site.module)
        weight = module.weight.detach()
        rounding = Rounding(form, kept=kept_before(weight))
        latent = rounding.latent(weight, form.codes)
        parametrize.register_parametrization(module, "weight", rounding, unsafe=True)
        with torch.no_grad():
            module.parametrizations.weight.original.copy_(latent)

    def trainer(self, **given: Any) -> Distiller:
        """Who makes its steps."""
        return _ThroughRounding(
            scale_rate=self._scale_rate, teacher=self._teacher, loss=self._loss, model=self.model, **given
        )

    def save(self, folder: Path) -> None:
        """Write the codes and scales, and beside them the student with its matrices as they were before."""
        tensors: dict[str, Tensor] = {}
        for name, rounding, latent in _rounded(self.model):
            form = rounding.form(latent)
            assert isinstance(form.scale, Dense)
            tables = {"codes": form.codes, "scale": form.scale.weight, "zero": form.zero}
            tensors |= {f"{name}.{table}": t.cpu().contiguous() for table, t in tables.items() if t is not None}
        for name, key in self._originals.items():
            module = self.model.get_submodule(name.rpartition(".")[0])
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            with torch.no_grad():
                module.weight.copy_(self._student.weights.dense(key))
        super().save(folder)
        safetensors.write(folder / CODES, tensors)


def _rounded(model: nn.Module) -> Iterator[tuple[str, Rounding, Tensor]]:
    """What is rounded: names of parameters, what rounds them, and the latent weights."""
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            found = module.parametrizations.weight
            yield f"{name}.weight", found[0], found.original


class _ThroughRounding(Distiller):
    """The same with a rate of their own for scales and zero points."""

    def __init__(self, *, scale_rate: float, **given: Any) -> None:
        super().__init__(**given)
        self._scale_rate = scale_rate

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """What the recipe names, with a second group: both rates fall as the schedule says."""
        if self.optimizer is None:
            optimizer: torch.optim.Optimizer = super().create_optimizer(model)
            tables = [p for _, rounding, _ in _rounded(self.model) for p in rounding.parameters()]
            apart = {id(p) for p in tables}
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in apart]
            optimizer.add_param_group({"params": tables, "lr": self._scale_rate, "weight_decay": 0.0})
        made: torch.optim.Optimizer = self.optimizer
        return made
