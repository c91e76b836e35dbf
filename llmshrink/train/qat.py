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
from llmshrink.methods.sparsity import zeros_kept
from llmshrink.model.anatomy import Matrix
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.qat import CODES
from llmshrink.plan.training import Training
from llmshrink.plan.zeros import matrices_of
from llmshrink.report.schema import TrainReport, ZerosReport
from llmshrink.train.distillation import Distillation
from llmshrink.train.rounding import Rounding
from llmshrink.train.trainer import Distiller
from llmshrink.train.zeros import Zeros


class Qat(Distillation):
    """A student whose linears are rounded in every forward pass, and its teacher."""

    def __init__(
        self, training: Training, student: StreamedModel, device: torch.device, *, rounded: StreamedModel, **given: Any
    ) -> None:
        """Load student and teacher, and put the rounding between the student's weights and what uses them.

        Args:
            training: who learns from whom.
            student: as it is before it was rounded.
            device: where it will be trained.
            rounded: the same once it was rounded.
            **given: as of distillation.
        """
        super().__init__(training, student, device, **given)
        assert training.stage.qat is not None
        self._scale_rate = training.stage.qat.scale_rate
        self._keep_zeros = training.stage.train.keep_zeros
        matrices = [m for m in matrices_of(rounded) if m.key in rounded.weights.compressed]
        keys = {matrix.parameter: matrix.key for matrix in matrices_of(student)}
        self._originals = {matrix.parameter: keys[matrix.parameter] for matrix in matrices}
        left = [name for name in self._names if name not in self._originals]
        self._zeros = Zeros(self.model, left, self._keep_zeros)  # the others keep theirs in their rounding
        for matrix in matrices:
            form = rounded.weights.form(matrix.key)
            assert isinstance(form, Quantized)
            self._round(matrix, form)

    def _round(self, matrix: Matrix, form: Quantized) -> None:
        module = self.model.get_submodule(matrix.site.module)
        weight = module.weight.detach()
        rounding = Rounding(form, kept=zeros_kept(weight, self._keep_zeros))
        latent = rounding.latent(weight, form.codes)
        parametrize.register_parametrization(module, "weight", rounding, unsafe=True)
        with torch.no_grad():
            module.parametrizations.weight.original.copy_(latent)

    def trainer(self, **given: Any) -> Distiller:
        """Who makes its steps."""
        return self._made(_ThroughRounding, scale_rate=self._scale_rate, **given)

    def tell(self, report: TrainReport) -> TrainReport:
        """As of distillation, with the zeros of what is rounded."""
        told = super().tell(report)
        found = [
            _zeros(name, rounding, latent)
            for name, rounding, latent in _rounded(self.model)
            if rounding.kept is not None
        ]
        return told.model_copy(update={"zeros": [*told.zeros, *found]})

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


def _zeros(name: str, rounding: Rounding, latent: Tensor) -> ZerosReport:
    """Weights that were pruned have the code of zero, whatever was learned; others may have it too."""
    assert rounding.kept is not None
    weights, kept, rest = latent.numel(), int(rounding.kept.sum()), int(rounding(latent.detach()).count_nonzero())
    return ZerosReport(name=name, weights=weights, before=weights - kept, after=weights - rest)


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
