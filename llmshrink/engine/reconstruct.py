"""Block reconstruction: the codes and scales of a block, or the weights that are kept, learned together by gradient.

A method chooses the codes of one matrix after another, for its inputs alone. Here they all move until the block, given
what comes out of the compressed blocks before it, gives what the original block gave on the original's own states: so
it also makes up for the errors made before it. The loss is the squared difference of the two outputs.

Every weight has a latent number, counted in steps of its grid, and its code is the integer nearest to that; gradients
pass through the rounding as if it were not there (Bengio et al. 2013, arXiv 1308.3432). AdaRound (arXiv 2004.10568),
BRECQ (2102.05426) and SignRound (2309.05516) learn which neighbour of the plainly rounded weight is taken. Here a
latent starts within the code that the method chose, at the point next to the weight, and may go any number of steps:
what GPTQ found is kept, and the codes that were nearly others turn first. Scales of one level are learned as factors,
and rounded to what they are stored in at every step, so that what is learned is what is written. Zero points, minima
and the nested scales of k-quants stay; where the embedding is compressed, both models start from it. Weights that are
not rounded are learned as they are; what was dropped stays zero (after a pruning: arXiv 2510.14444).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import cycle, islice
from typing import Any, Protocol

import torch
from torch import Tensor

from llmshrink.engine.groups import GroupCompressor, Made
from llmshrink.engine.hidden import Hidden
from llmshrink.engine.lanes import side_by_side
from llmshrink.forms import Codebook, Dense, Form, LowRank, Quantized, Sparse, Sum, coded, decode, learnable, on
from llmshrink.methods.codes import nearest
from llmshrink.methods.sparsity import kept_before
from llmshrink.model.anatomy import Block, Matrix
from llmshrink.model.rounding import as_stored, straight_through
from llmshrink.recipe.reconstruct import ReconstructSpec
from llmshrink.report.schema import BlockReport

CELL = 0.49  # steps from a code within which its latent starts; at half a step it would be the next code's
ROOM = 1 << 22  # distances that are in memory at a time
PACES = (1.0, 0.25)  # the second where a block gets no better: one that is nearly right already
BETAS = (0.9, 0.95)  # few steps: an average of squares over 1000 would not follow


class _Learned(Protocol):
    """One matrix while it is learned."""

    def sets(self, spec: ReconstructSpec, pace: float) -> list[dict[str, Any]]:
        """What is learned of it, with its rates, as torch's optimizers take it."""

    def weight(self) -> Tensor:
        """What it means now, float32 [out, in]; gradients reach what is learned."""

    def result(self) -> Form:
        """What is to be stored."""


class _Codes:
    """One matrix as latents and factors of its scales; weights that a mask drops keep their code, which means zero."""

    def __init__(self, form: Quantized, weight: Tensor, mask: Tensor | None) -> None:
        """`weight` is the original, float32 [out, in]; `mask` is true where weights are kept, None: everywhere."""
        assert form.learnable and not isinstance(form.block, int)
        self.form, self._group, self._mask = form, form.block[1], mask
        codes = form.codes.float()
        self._low, self._high = (float(code) for code in torch.aminmax(codes))
        self._scale = decode(form.scale)
        self._minimum = 0.0 if form.minimum is None else decode(form.minimum)[..., None]
        self._zero = 0.0 if form.zero is None else form.zero.float()[..., None]
        inverse = self._scale.reciprocal().nan_to_num_(0, 0, 0)[..., None]
        exact = ((self._groups(weight) + self._minimum) * inverse + self._zero).view(codes.shape)
        latent = torch.clamp(exact, codes - CELL, codes + CELL)
        self.latent = (latent if mask is None else torch.where(mask, latent, codes)).requires_grad_()
        self.factor = torch.zeros_like(self._scale).requires_grad_(isinstance(form.scale, Dense))

    def sets(self, spec: ReconstructSpec, pace: float) -> list[dict[str, Any]]:
        """Latents, and factors of scales."""
        scales = [{"params": [self.factor], "lr": pace * spec.scale_rate}] if self.factor.requires_grad else []
        return [{"params": [self.latent], "lr": pace * spec.rate_of(self.form.bits)}, *scales]

    def _groups(self, values: Tensor) -> Tensor:
        return values.view(len(values), -1, self._group)

    @property
    def codes(self) -> Tensor:
        """Float32 [out, in]."""
        codes = self.latent.detach().round().clamp_(self._low, self._high)
        return codes if self._mask is None else torch.where(self._mask, codes, self.form.codes.float())

    def weight(self) -> Tensor:
        """What the codes and the scales mean, float32 [out, in]; gradients reach latents and factors."""
        latent = self.latent if self._mask is None else torch.where(self._mask, self.latent, self.latent.detach())
        codes = straight_through(latent, torch.round).clamp(self._low, self._high)
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


class _Floats:
    """One matrix of floats, each counted in the root mean square of those kept; what a mask drops stays zero."""

    def __init__(self, form: Dense, mask: Tensor | None) -> None:
        self.form, self._mask = form, mask
        exact = form.weight.float()
        count = int(mask.sum()) if mask is not None else exact.numel()
        self._unit = float((exact.square().sum(dtype=torch.float64) / max(1, count)).sqrt()) or 1.0
        self.latent = (exact / self._unit).requires_grad_()

    def sets(self, spec: ReconstructSpec, pace: float) -> list[dict[str, Any]]:
        """The weights."""
        return [{"params": [self.latent], "lr": pace * spec.weight_rate}]

    def weight(self) -> Tensor:
        """As they are stored, float32 [out, in]; gradients pass through the rounding."""
        stored = as_stored(self.latent * self._unit, self.form.weight.dtype)
        return stored if self._mask is None else stored * self._mask

    @torch.no_grad()
    def result(self) -> Dense:
        """What is to be stored."""
        return Dense(self.weight().to(self.form.weight.dtype))


class _Tables:
    """One matrix as latents and tables: each weight, or vector of them, is the entry nearest to its latent.

    Values move by the gradients of all weights that have them, and weights go over to others as latents move (DKM, Cho
    et al. 2022, arXiv 2108.12659, learns tables so; there weights are mixtures of all values while they are learned).
    """

    def __init__(self, form: Codebook, weight: Tensor) -> None:
        """`weight` is the original, float32 [out, in]."""
        self.form, self._values = form, form.table.float()
        groups, count, dim = self._values.shape
        self._scale = torch.ones_like(weight[:, :1]) if form.scale is None else form.scale.float()[:, None]
        low, high = self._values.amin(1, keepdim=True), self._values.amax(1, keepdim=True)
        step = (high - low).mean(2, keepdim=True) / max(1, count ** (1 / dim) - 1)
        self._unit = step.clamp_(min=torch.finfo(torch.float32).tiny)
        exact = (weight / torch.where(self._scale > 0, self._scale, 1)).reshape(groups, -1, dim)
        self.latent = (self._inside(exact) / self._unit).requires_grad_()
        self.shift = torch.zeros_like(self._values).requires_grad_()
        self.factor = torch.zeros_like(self._scale).requires_grad_(form.scale is not None)

    def _inside(self, exact: Tensor) -> Tensor:
        """The points next to `exact` [groups, n, dim] of which the entries that the codes name are the nearest."""
        codes = self.form.codes.view(len(exact), -1).long()
        found = []
        for x, code, table in zip(exact, codes, self._values, strict=True):
            for part, own in zip(
                torch.split(x, ROOM // len(table)), torch.split(code, ROOM // len(table)), strict=True
            ):
                apart = (table - table[:, None]).square().sum(2)[own]  # from the entry that each has, to all others
                way = part - table[own]
                along = way @ table.T - (way * table[own]).sum(1, keepdim=True)
                limit = torch.where((along > 0) & (apart > 0), apart / (2 * along), torch.inf).amin(1, keepdim=True)
                found.append(table[own] + way * (2 * CELL * limit).clamp_(max=1))
        return torch.cat(found).view(exact.shape)

    def sets(self, spec: ReconstructSpec, pace: float) -> list[dict[str, Any]]:
        """Latents and shifts of values, in mean distances between the entries of a table, and factors of scales."""
        scales = [{"params": [self.factor], "lr": pace * spec.scale_rate}] if self.factor.requires_grad else []
        rate = spec.rate_of(self.form.bits // self.form.dim)
        return [{"params": [self.latent], "lr": pace * rate}, {"params": [self.shift], "lr": pace * rate}, *scales]

    def _table(self) -> Tensor:
        stored = as_stored(self._values + self.shift * self._unit, self.form.table.dtype)
        return stored.sort(1).values if stored.shape[2] == 1 else stored  # single values may pass each other

    def _stored(self) -> Tensor:
        if self.form.scale is None:
            return self._scale
        return as_stored(self._scale * (1 + self.factor), self.form.scale.dtype)

    def weight(self) -> Tensor:
        """The nearest entries, float32 [out, in]; gradients reach them, and pass through to the latents."""
        table, latent = self._table(), self.latent * self._unit
        codes = nearest(latent.detach(), table.detach())
        found = table.gather(1, codes[..., None].expand_as(latent))
        units: Tensor = (found + (latent - latent.detach())).view(self.form.shape)
        return units * self._stored()

    @torch.no_grad()
    def result(self) -> Codebook:
        """What is to be stored."""
        table = self._table()
        codes = nearest(self.latent * self._unit, table).to(torch.uint8).view(self.form.codes.shape)
        scale = None if self.form.scale is None else self._stored()[:, 0].to(self.form.scale.dtype)
        return replace(self.form, codes=codes, table=table.to(self.form.table.dtype), scale=scale)


class _Product:
    """Two factors of floats, of which one that other blocks share stays as it is."""

    def __init__(self, form: LowRank) -> None:
        assert isinstance(form.left, Dense) and isinstance(form.right, Dense)
        self.form, self._left = form, _Floats(form.left, None)
        self._right = _Floats(form.right, None) if form.shared is None else None

    def sets(self, spec: ReconstructSpec, pace: float) -> list[dict[str, Any]]:
        """Those of both factors."""
        return [*self._left.sets(spec, pace), *(self._right.sets(spec, pace) if self._right is not None else [])]

    def weight(self) -> Tensor:
        """Their product, float32 [out, in]."""
        right = self.form.right if self._right is None else Dense(self._right.weight())
        return decode(replace(self.form, left=Dense(self._left.weight()), right=right))

    def result(self) -> LowRank:
        """What is to be stored."""
        right = self.form.right if self._right is None else self._right.result()
        return replace(self.form, left=self._left.result(), right=right)


class _Total:
    """A sum, of which some parts are learned and others stay."""

    def __init__(self, form: Sum, weight: Tensor) -> None:
        """`weight` is the original, float32 [out, in]."""
        self.form, whole = form, decode(form)
        self._learned = {
            number: _learned(part, weight - (whole - decode(part)))
            for number, part in enumerate(form.parts)
            if learnable(part)
        }
        self._rest = sum((decode(p) for i, p in enumerate(form.parts) if i not in self._learned), weight.new_zeros(()))

    def sets(self, spec: ReconstructSpec, pace: float) -> list[dict[str, Any]]:
        """Those of all parts that are learned."""
        return [one for part in self._learned.values() for one in part.sets(spec, pace)]

    def weight(self) -> Tensor:
        """What they mean together, float32 [out, in]."""
        return sum((part.weight() for part in self._learned.values()), self._rest)

    def result(self) -> Sum:
        """What is to be stored."""
        parts = enumerate(self.form.parts)
        return Sum(tuple(self._learned[i].result() if i in self._learned else part for i, part in parts))


def _learned(form: Form, weight: Tensor) -> _Learned:
    """A form while it is learned; `weight` is the original, float32 [out, in]."""
    if isinstance(form, Codebook):
        return _Tables(form, weight)
    if isinstance(form, LowRank):
        return _Product(form)
    if isinstance(form, Sum):
        return _Total(form, weight)
    values, mask = (form.values, form.mask) if isinstance(form, Sparse) else (form, None)
    if isinstance(values, Dense):
        kept = values.weight != 0 if mask is None else mask
        return _Floats(values, None if kept.all() else kept)
    assert isinstance(values, Quantized)
    return _Codes(values, weight, kept_before(weight) if mask is None else mask)


def reconstruct(
    block: Block, made: Made, hidden: Hidden, groups: GroupCompressor, spec: ReconstructSpec, seed: int
) -> list[BlockReport]:
    """Learn what can be learned of a compressed block, and take it over into `made` where it is better.

    Returns:
        What it gained; empty where nothing can be learned.
    """
    model = hidden.model
    forms = {m: form for m, form in made.forms.items() if learnable(form)}
    # Experts that are one parameter are learned together, or not at all. One form was perhaps made on the CPU.
    forms = {matrix: on(forms[matrix], model.device) for matrix in model.complete(forms)}
    if not forms:
        return []
    model.load_block(block.index, made.decoded)
    before = difference(block, hidden)
    report = BlockReport(block=block.index, error_before=before, error_after=before)
    for pace in PACES if before else ():
        learned = learn(block, forms, hidden, spec, pace=pace, seed=seed, scale=before)
        trial = made.copy()
        for matrix, form in learned.items():
            groups.replace(trial, matrix, form)
        model.load_block(block.index, trial.decoded)
        after = difference(block, hidden)  # of what would be written
        if after < before:
            made.tensors, made.decoded, made.layers = trial.tensors, trial.decoded, trial.layers
            report = report.model_copy(update={"error_after": after, "codes_changed": _changed(forms, learned)})
            break
    model.drop_block(block.index)
    return [report]


def _changed(before: Mapping[Matrix, Form], after: Mapping[Matrix, Form]) -> float | None:
    """The share of codes that are others; None: there are no codes."""
    pairs = [(coded(before[m]), coded(form)) for m, form in after.items()]
    codes = [(one.codes, other.codes) for one, other in pairs if one is not None and other is not None]
    changed = sum(int((one != other).sum()) for one, other in codes)
    return changed / sum(one.numel() for one, _ in codes) if codes else None


def learn(
    block: Block,
    forms: Mapping[Matrix, Form],
    hidden: Hidden,
    spec: ReconstructSpec,
    *,
    pace: float = 1.0,
    seed: int,
    scale: float,
) -> dict[Matrix, Form]:
    """Other weights, or codes and scales, for matrices of a block; what is loaded of the others is taken as it is.

    Args:
        block: which one.
        forms: what was chosen for the matrices that are learned.
        hidden: the states that enter it, and of the original those that leave it.
        spec: how long, and how fast.
        pace: what the rates are multiplied by.
        seed: of the order of batches.
        scale: what `difference` is before, more than zero; the loss is counted in it.
    """
    learned = {m: _learned(form, hidden.model.read(m).float()) for m, form in forms.items()}
    sets = [one for each in learned.values() for one in each.sets(spec, pace)]
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
    return {m: _as(forms[m], each.result()) for m, each in learned.items()}


def _as(form: Form, values: Form) -> Form:
    """Other values under the mask of a form, if it has one."""
    return replace(form, values=values) if isinstance(form, Sparse) else values


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
