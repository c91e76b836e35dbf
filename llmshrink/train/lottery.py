"""A student that is found by rounds: train, drop the smallest weights, go back to early weights, train again.

Iterative magnitude pruning (Frankle and Carbin 2019, arXiv 1803.03635), with weights and rate rewound to an early step
of the first training (Frankle et al. 2020, arXiv 1912.05671); of pretrained models that step may be the very first
(Chen et al. 2020, arXiv 2007.12223). After round i of n a share of 1 - (1 - s)^(i / n) is zero. Averages of the
optimizer begin anew in each round.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmshrink.engine.workspace import Workspace
from llmshrink.errors import InputError
from llmshrink.formats.bits import pack_mask, unpack_mask
from llmshrink.io import safetensors
from llmshrink.methods.sparsity import highest
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.steps import Steps
from llmshrink.plan.training import Training
from llmshrink.progress import Progress
from llmshrink.recipe.lottery import LotterySpec
from llmshrink.report.schema import RoundReport, TrainReport
from llmshrink.train.data import Examples
from llmshrink.train.distillation import Distillation
from llmshrink.train.folders import LOTTERY
from llmshrink.train.run import count, finished, train
from llmshrink.train.trainer import Distiller
from llmshrink.train.zeros import Zeros

EARLY, MASKS = "early.safetensors", "masks.safetensors"


class Lottery(Distillation):
    """A student whose weights are drawn in rounds."""

    def __init__(self, training: Training, student: StreamedModel, device: torch.device, **given: Any) -> None:
        """As of distillation; `begin` says which round it is."""
        super().__init__(training, student, device, **given)
        assert training.stage.lottery is not None
        self.spec: LotterySpec = training.stage.lottery
        self._warmup, self._number, self._begun, self._steps = training.stage.train.warmup, 0, 0, 0
        self._masks: dict[str, Tensor] = {}
        self._early: _Early | None = None

    def begin(self, number: int, steps: int, folder: Path, workspace: Workspace) -> None:
        """Put the model into the state in which a round's training begins.

        Args:
            number: of the round, from 0, in which nothing has been dropped.
            steps: of the whole first training.
            folder: of the masks that the round before found.
            workspace: where early weights are kept.
        """
        early, self._steps, self._number = self.spec.early(steps), steps, number
        self.task = f"distill, training {number + 1} of {self.spec.rounds + 1}"
        self._begun = 0 if number == 0 else early
        self._early = _Early(early, workspace) if number == 0 else None
        if number:
            weights = self._read_early(workspace.work / EARLY)
            packed = read(folder / MASKS)
            self._masks = {name: unpack_mask(bits, weights[name].numel()) for name, bits in packed.items()}
            rewind(self.model, weights, self._masks)
        self._zeros = Zeros(self.model, self._names, True)

    def _read_early(self, path: Path) -> dict[str, Tensor]:
        if not path.is_file():
            raise InputError(
                f"The first training ended before the step to go back to ({self.spec.early(self._steps)}).",
                hint="Lower lottery.rewind, or raise train.max_minutes or train.patience.",
            )
        return read(path)

    def trainer(self, **given: Any) -> Distiller:
        """Who makes a round's steps."""
        given["args"].warmup_steps = round(self._warmup * self._steps)
        made = self._made(Late, begun=self._begun, **given)
        if self._early is not None:
            made.add_callback(self._early)
        return made

    def save(self, folder: Path) -> None:
        """Write which weights the next round has; of the last the student."""
        if self._number == self.spec.rounds:
            super().save(folder)
            return
        weights = {name: self.model.get_parameter(name).detach().cpu() for name in self._names}
        masks = drawn(weights, self._masks, self.spec.share(self._number + 1), whole=self.spec.per == "model")
        folder.mkdir(parents=True)
        safetensors.write(folder / MASKS, {name: pack_mask(mask) for name, mask in masks.items()})


def draw(
    make: Callable[[], Lottery],
    spec: LotterySpec,
    steps: Steps,
    examples: Examples,
    *,
    workspace: Workspace,
    done: list[dict[str, Any]],
    device: torch.device,
    progress: Progress,
) -> tuple[Path, TrainReport]:
    """All rounds, or those that are left; else as `train`.

    Args:
        make: loads the student and its teacher, where a round is left.
        spec: how many rounds there are, and of what.
        steps: of the first training.
        examples: to learn from.
        workspace: of the run.
        done: entries of the journal about this training.
        device: where it is computed.
        progress: told of the steps.
    """
    whole, lottery = count(steps, examples), None
    early = spec.early(whole)
    if not any("early" in entry and workspace.holds(entry["training"]) for entry in done):
        done = [entry for entry in done if entry.get("state", {"step": early})["step"] < early]  # until then
    shared, reports, folder = workspace.part(LOTTERY), list[TrainReport](), workspace.work
    shared.work.mkdir(exist_ok=True)
    for number in range(spec.rounds + 1):
        own = workspace.part(f"{LOTTERY}/{number}")
        entries = [entry for entry in done if entry.get("part") == f"{LOTTERY}/{number}"]
        found = finished(own, entries)
        if found is None:
            lottery = lottery or make()
            lottery.begin(number, whole, folder, shared)
            left = whole if number == 0 else whole - early
            limited = replace(steps, spec=steps.spec.model_copy(update={"max_steps": left}))
            found = train(lottery, limited, examples, workspace=own, done=entries, device=device, progress=progress)
        folder = found[0]
        reports.append(found[1])
    return folder, told(spec, reports)


def told(spec: LotterySpec, reports: list[TrainReport]) -> TrainReport:
    """The report of all trainings: that of the last, with what all cost."""
    rounds = [
        RoundReport(
            sparsity=sum(z.before for z in one.zeros) / sum(z.weights for z in one.zeros) if one.zeros else 0.0,
            steps=one.steps,
            held_before=one.held_before,
            held_after=one.held_after,
            seconds=one.seconds,
        )
        for one in reports
    ]
    sums = {name: sum(getattr(one, name) for one in reports) for name in ("steps", "tokens", "seconds")}
    return reports[-1].model_copy(update={"rounds": rounds, **sums})


def drawn(weights: Mapping[str, Tensor], kept: Mapping[str, Tensor], share: float, *, whole: bool) -> dict[str, Tensor]:
    """Which weights the next round has: the largest of those that this one has.

    Args:
        weights: as they were trained, any shape.
        kept: which of them this round has, bool, flat; those that are not there are whole.
        share: of all of them is dropped then.
        whole: whether those of all matrices compete, or those of each.

    Returns:
        Bool, in the shapes of the weights.
    """
    scores = {name: weight.float().abs().flatten() for name, weight in weights.items()}
    for name, mask in kept.items():
        scores[name][~mask] = -1.0  # below any magnitude: what is gone stays so
    if not whole:
        return {name: _largest(score, share).view(weights[name].shape) for name, score in scores.items()}
    ends = itertools.accumulate(len(score) for score in scores.values())
    found = _largest(torch.cat(list(scores.values())), share)
    pairs = zip(weights.items(), ends, strict=True)
    return {name: found[end - weight.numel() : end].view(weight.shape) for (name, weight), end in pairs}


def _largest(score: Tensor, share: float) -> Tensor:
    return highest(score[None], len(score) - round(share * len(score)))[0]


@torch.no_grad()
def rewind(model: torch.nn.Module, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Give a model early weights, of which only some are kept (bool, flat)."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
        parameter.grad = None
        if name in masks:
            parameter.masked_fill_(~masks[name].view(parameter.shape).to(parameter.device), 0)


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file."""
    found = safetensors.Checkpoint(path.parent, safetensors.read_header(path))
    return {name: found.get(name).clone() for name in found.infos}


class Late(Distiller):
    """Begins at a later step: with the rate of then."""

    def __init__(self, *, begun: int, **given: Any) -> None:
        """`begun`: steps that are not made."""
        self._begun = begun
        super().__init__(**given)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """What says the rate of each step."""
        first = self.lr_scheduler is None
        made = super().create_scheduler(num_training_steps + self._begun, optimizer)
        if first and self._begun:
            made.lr_lambdas = [partial(_later, rate, self._begun) for rate in made.lr_lambdas]
            for group, base, rate in zip(made.optimizer.param_groups, made.base_lrs, made.lr_lambdas, strict=True):
                group["lr"] = base * rate(0)
        return made


def _later(rate: Callable[[int], float], begun: int, step: int) -> float:
    return rate(step + begun)


class _Early(TrainerCallback):  # type: ignore[misc] # it has no types
    """Keeps the weights of an early step of the first training."""

    def __init__(self, step: int, workspace: Workspace) -> None:
        self._step, self._workspace = step, workspace

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: Any, **_: Any
    ) -> None:
        """Before the first step."""
        self._keep(state, model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: Any, **_: Any
    ) -> None:
        """Behind each."""
        self._keep(state, model)

    def _keep(self, state: TrainerState, model: torch.nn.Module) -> None:
        if state.global_step != self._step or not state.is_world_process_zero:
            return
        path = self._workspace.work / EARLY
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        saved = {self._workspace.below(path): safetensors.write(path, weights)}
        self._workspace.append({"files": {}, "training": saved, "early": state.global_step})
