"""Block reconstruction: the codes and scales of a block, learned together by gradient.

A method chooses the codes of one matrix after another, for its inputs alone. Here they all move until the block, given
what comes out of the compressed blocks before it, gives what the original block gave on the original's own states: so
it also makes up for the errors made before it. The loss is the squared difference of the two outputs.

Every weight has a latent number, counted in steps of its grid, and its code is the integer nearest to that; gradients
pass through the rounding as if it were not there (Bengio et al. 2013, arXiv 1308.3432). AdaRound (arXiv 2004.10568),
BRECQ (2102.05426) and SignRound (2309.05516) learn which neighbour of the plainly rounded weight is taken. Here a
latent starts within the code that the method chose, at the point next to the weight, and may go any number of steps:
what GPTQ found is kept, and the codes that were nearly others turn first. Scales of one level are learned as factors,
and rounded to what they are stored in at every step, so that what is learned is what is written. Zero points, minima
and the nested scales of k-quants stay; where the embedding is compressed, both models start from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from llmshrink.engine.groups import GroupCompressor, Made
from llmshrink.engine.hidden import Hidden
from llmshrink.engine.lanes import side_by_side
from llmshrink.forms import Dense, Quantized, decode
from llmshrink.model.anatomy import Block, Matrix
from llmshrink.model.rounding import as_stored, straight_through
from llmshrink.recipe.reconstruct import ReconstructSpec
from llmshrink.report.schema import BlockReport

CELL = 0.49  # steps from a code within which its latent starts; at half a step it would be the next code's
PACES = (1.0, 0.25)  # the second where a block gets no better: one that is nearly right already
BETAS = (0.9, 0.95)  # few steps: an average of squares over 1000 would not follow


class _Learned:
    """One matrix as latents and factors of its scales."""

    def __init__(self, form: Quantized, weight: Tensor) -> None:
        """`weight` is the original, float32 [out, in]."""
        assert form.learnable and not isinstance(form.block, int)
        self.form, self._group = form, form.block[1]
        codes = form.codes.float()
        self._low, self._high = (float(code) for code in torch.aminmax(codes))
        self._scale = decode(form.scale)
        self._minimum = 0.0 if form.minimum is None else decode(form.minimum)[..., None]
        self._zero = 0.0 if form.zero is None else form.zero.float()[..., None]
        inverse = self._scale.reciprocal().nan_to_num_(0, 0, 0)[..., None]
        exact = ((self._groups(weight) + self._minimum) * inverse + self._zero).view(codes.shape)
        self.latent = torch.clamp(exact, codes - CELL, codes + CELL).requires_grad_()
        self.factor = torch.zeros_like(self._scale).requires_grad_(isinstance(form.scale, Dense))

    def _groups(self, values: Tensor) -> Tensor:
        return values.view(len(values), -1, self._group)

    @property
    def codes(self) -> Tensor:
        """Float32 [out, in]."""
        return self.latent.detach().round().clamp_(self._low, self._high)

    def weight(self) -> Tensor:
        """What the codes and the scales mean, float32 [out, in]; gradients reach latents and factors."""
        codes = straight_through(self.latent, torch.round).clamp(self._low, self._high)
        steps = self._groups(codes) - self._zero
        return (steps * self._stored()[..., None] - self._minimum).view(codes.shape)

    def _stored(self) -> Tensor:
        if not isinstance(self.form.scale, Dense):
            return self._scale
        dtype = self.form.scale.weight.dtype
        return as_stored(self._scale * (1 + self.factor), dtype)

    @torch.no_grad()
    def result(self) -> Quantized:
        """What is to be stored."""
        codes = self.codes.to(self.form.codes.dtype)
        if not isinstance(self.form.scale, Dense):
            return replace(self.form, codes=codes)
        return replace(self.form, codes=codes, scale=Dense(self._stored().to(self.form.scale.weight.dtype)))


def reconstruct(
    block: Block, made: Made, hidden: Hidden, groups: GroupCompressor, spec: ReconstructSpec, seed: int
) -> list[BlockReport]:
    """Learn what can be learned of a compressed block, and take it over into `made` where it is better.

    Returns:
        What it gained; empty where nothing can be learned.
    """
    model = hidden.model
    forms = {m: form for m, form in made.forms.items() if isinstance(form, Quantized) and form.learnable}
    # Experts that are one parameter are learned together, or not at all. One form was perhaps made on the CPU.
    forms = {matrix: forms[matrix].to(model.device) for matrix in model.complete(forms)}
    if not forms:
        return []
    model.load_block(block.index, made.decoded)
    before = difference(block, hidden)
    report = BlockReport(block=block.index, error_before=before, error_after=before, codes_changed=0.0)
    for pace in PACES if before else ():
        learned = learn(block, forms, hidden, spec, pace=pace, seed=seed, scale=before)
        trial = made.copy()
        for matrix, form in learned.items():
            groups.replace(trial, matrix, form)
        model.load_block(block.index, trial.decoded)
        after = difference(block, hidden)  # of what would be written
        if after < before:
            made.tensors, made.decoded, made.layers = trial.tensors, trial.decoded, trial.layers
            changed = sum(int((form.codes != forms[m].codes).sum()) for m, form in learned.items())
            share = changed / sum(m.numel for m in learned)
            report = report.model_copy(update={"error_after": after, "codes_changed": share})
            break
    model.drop_block(block.index)
    return [report]


def learn(
    block: Block,
    forms: Mapping[Matrix, Quantized],
    hidden: Hidden,
    spec: ReconstructSpec,
    *,
    pace: float = 1.0,
    seed: int,
    scale: float,
) -> dict[Matrix, Quantized]:
    """Other codes and scales for matrices of a compressed block; what is loaded of the others is taken as it is.

    Args:
        block: which one.
        forms: what was chosen for the matrices that are learned.
        hidden: the states that enter it, and of the original those that leave it.
        spec: how long, and how fast.
        pace: what the rates are multiplied by.
        seed: of the order of batches.
        scale: what `difference` is before, more than zero; the loss is counted in it.
    """
    learned = {m: _Learned(form, hidden.model.read(m).float()) for m, form in forms.items()}
    sets: list[dict[str, Any]] = [
        {"params": [each.latent], "lr": pace * spec.rate_of(each.form.bits)} for each in learned.values()
    ]
    sets.append({"params": [each.factor for each in learned.values()], "lr": pace * spec.scale_rate})
    # What Adam does must not depend on how large states are: hence the scale, and an eps that is small.
    optimizer = torch.optim.Adam(sets, betas=BETAS, eps=1e-15)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, spec.steps)
    shuffled = torch.randperm(len(hidden.batches), generator=torch.Generator().manual_seed(seed + block.index))
    order = cycle(shuffled.tolist())
    for _ in range(spec.steps):
        optimizer.zero_grad()
        _add_gradients(block, learned, hidden, _some(order, hidden, spec.tokens), scale)
        optimizer.step()
        schedule.step()
    return {m: each.result() for m, each in learned.items()}


def difference(block: Block, hidden: Hidden) -> float:
    """The mean squared difference between what leaves a loaded block and what left the original's, over all batches."""

    def job(batch: int) -> tuple[float, int]:
        out = hidden.run(block.index, batch)
        rest = out.float() - hidden.aim(batch).float()
        return float(rest.square().sum(dtype=torch.float64)), rest.numel()

    found = list(side_by_side(hidden.model.device, job, len(hidden.batches)))
    return sum(total for total, _ in found) / max(1, sum(size for _, size in found))


def _some(order: Iterator[int], hidden: Hidden, tokens: int) -> list[int]:
    """The next batches, until they have so many tokens."""
    size = max(batch.numel() for batch in hidden.batches)
    return list(islice(order, min(len(hidden.batches), -(-tokens // size))))


def _add_gradients(
    block: Block, learned: Mapping[Matrix, _Learned], hidden: Hidden, batches: list[int], scale: float
) -> None:
    """Add up the gradients of some batches."""
    weights = {m.key: each.weight() for m, each in learned.items()}
    # Gradients of all batches are added up here before they go on to the latents, once.
    leaves = {key: weight.detach().requires_grad_() for key, weight in weights.items()}
    for batch in batches:
        out = hidden.run(block.index, batch, leaves)
        target = hidden.aim(batch)
        loss = (out.float() - target.float()).square().sum() / scale**0.5  # gradients of about 1, for float16
        loss.backward()
    reached = [key for key, leaf in leaves.items() if leaf.grad is not None]  # not experts that no token went to
    torch.autograd.backward([weights[key] for key in reached], [leaves[key].grad for key in reached])
