"""Tuning from end to end: scales, norms and biases of all blocks at once, towards the original's own logits.

What blocks were learned for alone (`reconstruct`) is not yet what the model gives out. Here the small parameters move
by the KL divergence of the original's distribution of each next token from the compressed model's, through the whole
model. Learning step sizes from end to end: EfficientQAT (arXiv 2407.11062, section 3.3); only norms: Norm Tweaking
(2309.02784). The original's logits come from its last states, which the run carries, and its head.

An eighth of the calibration rows is held back: what is learned of the others counts only if these gain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmshrink.engine.backward import backward, forward
from llmshrink.engine.hidden import Hidden
from llmshrink.engine.moves import Moved, Moves
from llmshrink.engine.shards import Shards
from llmshrink.io import safetensors
from llmshrink.memory import trim
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.work import Work
from llmshrink.recipe.tune import TuneSpec

BETAS = (0.9, 0.95)  # few steps: an average of squares over 1000 would not follow
HELD = 8  # one batch of so many is held back


@dataclass
class Point:
    """Where a tuning is: what a run that goes on needs, beside the moves and Adam's averages."""

    attempt: int = 0
    step: int = 0
    before: float | None = None  # KL on the rows held back, before anything moved


class Targets:
    """Calibration batches with the states in which they left the original's last block."""

    def __init__(self, model: StreamedModel, batches: list[Tensor], ends: list[Tensor], logits: int) -> None:
        """`logits` are bytes of one model's logits to ask for at a time."""
        self.model, self.batches, self._ends, self._logits = model, batches, ends, logits
        held = range(0, len(batches), HELD) if len(batches) > 1 else range(1)
        self.held = list(held)
        self.rest = [n for n in range(len(batches)) if n not in held or len(batches) == 1]

    def chosen(self, step: int, tokens: int, seed: int) -> list[int]:
        """The batches of a step, one round of all after another, each in an order of its own."""
        size = max(self.batches[n].numel() for n in self.rest)
        count = min(len(self.rest), -(-tokens // size))
        found = []
        for place in range(step * count, (step + 1) * count):
            turn, number = divmod(place, len(self.rest))
            order = torch.randperm(len(self.rest), generator=torch.Generator().manual_seed(seed + turn))
            found.append(self.rest[int(order[number])])
        return found

    def divergence(self, batch: int, state: Tensor, moved: Moved, *, learn: bool) -> tuple[float, Tensor]:
        """KL(original || compressed) of a batch, summed over tokens, nats; and its gradient by the compressed state.

        A stretch of positions at a time. Where it learns, vectors behind the blocks get their gradients.
        """
        tokens, end = self.batches[batch], self._ends[batch]
        stretch = max(1, self._logits // (len(tokens) * self.model.width * 4))
        gradient, total = torch.zeros_like(state), 0.0
        for start in range(0, tokens.shape[1], stretch):
            part = slice(start, start + stretch)
            with torch.set_grad_enabled(learn):
                own = {key: moved.vector(key) for key in moved.outside}
                leaf = state[:, part].to(self.model.device).detach().requires_grad_(learn)
                logits = self.model.output(tokens[:, part], leaf, own)
            with torch.no_grad():
                target = torch.log_softmax(self.model.output(tokens[:, part], end[:, part]).float(), -1)
                found = torch.log_softmax(logits.float(), -1)
                total += float((target.exp() * (target - found)).sum(dtype=torch.float64))
                upstream = found.exp_().sub_(target.exp_()).to(logits.dtype)
            if learn:
                torch.autograd.backward(logits, upstream)
                assert leaf.grad is not None
                gradient[:, part] = leaf.grad
        return total, gradient


class Tuner:
    """Tunes the small parameters of a model that lies in shards.

    Attributes:
        point: How far it is.
        moves: What is learned.
    """

    def __init__(self, work: Work, shards: Shards, targets: Targets, folder: Path | None, seed: int) -> None:
        """`folder` is where states between blocks lie; None: in the device's memory."""
        assert work.tune is not None
        self._model, self._spec, self._targets, self._folder, self._seed = work.model, work.tune, targets, folder, seed
        self._work, self._shards = work, shards
        self.point = Point()
        self._begin()

    def _begin(self) -> None:
        """Nothing has moved."""
        self.moves = Moves.none(self._work)
        self._moved = Moved(self._work, self._shards, self.moves)
        sets = ((self.moves.scales, self.attempt.rate), (self.moves.vectors, self.attempt.norm_rate))
        groups: list[dict[str, Any]] = [{"params": list(v.values()), "lr": r} for v, r in sets if v]
        # What Adam does must not depend on how many tokens are summed: hence an eps that is small.
        self._optimizer = torch.optim.Adam(groups, betas=BETAS, eps=1e-15)
        self._rates = [group["lr"] for group in groups]

    @property
    def attempt(self) -> TuneSpec:
        """How fast it learns now."""
        return self._spec.slower[self.point.attempt]

    def run(self) -> Iterator[float]:
        """Learn; gives the mean KL of each step's tokens. A run that is not resumed may be left at any step."""
        if self.point.before is None:
            self.point.before = self.score()
        while self.point.step < self._spec.steps:
            loss = self._step()
            self.point.step += 1
            yield loss

    def slower(self) -> bool:
        """Begin anew at the next rate; False where there is none."""
        if self.point.attempt + 1 == len(self._spec.slower):
            return False
        self.point.attempt, self.point.step = self.point.attempt + 1, 0
        self._begin()
        return True

    def _step(self) -> float:
        chosen = self._targets.chosen(self.point.step, self._spec.tokens, self._seed)
        hidden = self._hidden(chosen)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * (1 - self.point.step / self._spec.steps)
        self._optimizer.zero_grad()

        def head(batch: int, state: Tensor) -> tuple[float, Tensor]:
            return self._targets.divergence(chosen[batch], state, self._moved, learn=True)

        total = backward(hidden, self._moved, head, self._folder)
        self._optimizer.step()
        return total / sum(batch.numel() for batch in hidden.batches)

    def score(self) -> float:
        """The mean KL on the rows held back, as it would be written; nats per token."""
        hidden = self._hidden(self._targets.held)
        with torch.no_grad():
            forward(hidden, self._moved)
        pairs = zip(self._targets.held, hidden.states, strict=True)
        total = sum(self._targets.divergence(n, state, self._moved, learn=False)[0] for n, state in pairs)
        return total / sum(batch.numel() for batch in hidden.batches)

    def _hidden(self, batches: list[int]) -> Hidden:
        return Hidden(self._model, [self._targets.batches[n] for n in batches], folder=self._folder)

    @property
    def tokens_held(self) -> int:
        """Tokens of the rows held back."""
        return sum(self._targets.batches[n].numel() for n in self._targets.held)

    def changed(self) -> dict[str, Tensor]:
        """All tensors that are to be written otherwise, by their names on disk."""
        found: dict[str, Tensor] = {}
        for part in self._work.parts:
            found |= self._moved.changed(part)
            trim()
        return found

    # --- saving

    def save(self, path: Path) -> str:
        """Write the moves and Adam's averages; returns the file's SHA-256."""
        tensors = {}
        for key, move in self.moves.all.items():
            tensors[f"{key}:move"] = move.detach()
            state = self._optimizer.state.get(move, {})  # none where no gradient ever came
            tensors |= {f"{key}:{name}": state[name] for name in ("step", "exp_avg", "exp_avg_sq") if state}
        return safetensors.write(path, tensors)

    def load(self, path: Path, point: Point) -> None:
        """Go on from what `save` wrote."""
        self.point = point
        self._begin()
        saved = safetensors.Checkpoint(path.parent, safetensors.read_header(path))
        for key, move in self.moves.all.items():
            with torch.no_grad():
                move.copy_(saved.get(f"{key}:move"))
            names = [name for name in ("step", "exp_avg", "exp_avg_sq") if f"{key}:{name}" in saved.infos]
            if names:
                found = {name: saved.get(f"{key}:{name}").clone() for name in names}
                # Adam counts its steps on the CPU, wherever the rest is.
                averages = {name: t if name == "step" else t.to(move.device) for name, t in found.items()}
                self._optimizer.state[move] = averages
