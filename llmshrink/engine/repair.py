"""Fitting what is left of a block, so that it makes up for what was cut out: linear least squares, no gradients.

Of a linear of the smaller block, x is what enters it and r what is missing in what it gives. The weights that give most
of it, in the mean square over calibration tokens, are `W + C (H + lambda)^-1` with H the second moment of x and C that
of r and x; lambda holds them to what they were where the text says little. A bias takes the mean of what is missing
(An et al. 2024, FLAP, arXiv 2312.11983, give it what the pruned channels gave on average).

What is missing: of the linear that writes last to the states between blocks, all by which these differ from the
original's behind the block and behind every block that is gone after it. So it makes up for its own block, for the
drift that came before, and for whole layers. Of one that writes earlier, the difference of its own output and of the
states that entered the block. Of any other, that of its own output. Which linears write so is tried out: what is added
to the output of one must come out of the block, the same, when those that write after it are silent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from llmshrink.engine.groups import GroupCompressor, Made
from llmshrink.engine.hidden import Hidden
from llmshrink.engine.lanes import Turns, side_by_side
from llmshrink.engine.reconstruct import difference
from llmshrink.forms import Dense, Event
from llmshrink.memory import trim
from llmshrink.methods.sparsity import kept_before, refit
from llmshrink.model.anatomy import Block, Group, Matrix
from llmshrink.model.streamed import HEAD_ROWS, Decoded
from llmshrink.plan.work import Repair

DAMPS = (0.001, 0.01, 0.1, 1.0, 10.0)  # lambdas that are tried, as shares of the mean diagonal
USUAL = 0.01  # where there is nothing to try them on
STEPS = 100  # of conjugate gradients at most, where a mask says which weights there are
HELD = 8  # one batch of so many, or of those there are, is held back to try them on
STRAIGHT = 1e-3  # how far what comes out may be from what was added, as a share of it
ROUNDINGS = 4  # of the compute dtype, by which it may be off besides
TRIED = 64  # tokens on which that is tried


class _Enough(Exception):  # noqa: N818 - what follows in the block is not needed
    pass


@dataclass
class Missing:
    """Sums over tokens of the inputs x of a linear and of what is missing r in what it gives; float32.

    Attributes:
        square: Of x x^T [in, in].
        cross: Of r x^T [out, in].
        mean: Of x [in].
        means: Of r [out].
        size: Of |r|^2.
        tokens: How many.
    """

    square: Tensor
    cross: Tensor
    mean: Tensor
    means: Tensor
    size: float = 0.0
    tokens: int = 0

    @classmethod
    def none(cls, shape: tuple[int, int], device: torch.device) -> Missing:
        """Before the first batch of a linear [out, in]."""
        out, width = shape
        zeros = partial(torch.zeros, device=device)
        return cls(zeros(width, width), zeros(out, width), zeros(width), zeros(out))

    def add(self, x: Tensor, rest: Tensor) -> None:
        """Add a batch: inputs [tokens, in], and what is missing of the outputs [tokens, out]."""
        self.tokens += len(x)
        self.square.addmm_(x.T, x)
        self.cross.addmm_(rest.T, x)
        self.mean += x.sum(0)
        self.means += rest.sum(0)
        self.size += float(rest.square().sum(dtype=torch.float64))

    def joined(self, other: Missing) -> Missing:
        """Both together."""
        mine, theirs = (list(vars(one).values()) for one in (self, other))
        return Missing(*(a + b for a, b in zip(mine, theirs, strict=True)))

    def left(self, added: Tensor, shift: Tensor | None) -> float:
        """The sum of |r - A x - b|^2, where A [out, in] and b [out] are added to the weight and the bias."""
        found = self.size - 2 * float((added * self.cross).sum()) + float((added @ self.square.double() * added).sum())
        if shift is not None:
            found += float(shift @ (self.tokens * shift - 2 * self.means + 2 * (added @ self.mean.double())))
        return found

    def fitted(self, damp: float, *, bias: bool, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What to add to a weight [out, in], and to its bias [out], so that least is missing; float64.

        argmin over A, b of mean |r - A x - b|^2 + lambda |A|^2, with lambda `damp` of the mean diagonal of the second
        moment of x; without a bias b is zero. Of a pruned weight, A is zero where the `mask` [out, in] is false: the
        bowl around the free solution has its lowest such point where `refit` finds it.
        """
        second, product = self.square.double() / self.tokens, self.cross.double() / self.tokens
        mean, means = self.mean.double() / self.tokens, self.means.double() / self.tokens
        if bias:
            second, product = second - torch.outer(mean, mean), product - torch.outer(means, mean)
        scale = float(second.diagonal().mean())
        second.diagonal().add_(damp * scale if scale > 0 else 1.0)
        added = torch.cholesky_solve(product.T, torch.linalg.cholesky(second)).T
        if mask is not None:
            added = refit(added, added * mask, mask, second, 0.0, STEPS)
        return added, means - added @ mean if bias else None


def best_fit(
    text: Missing, held: Missing, damp: float | None, *, bias: bool, mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None] | None:
    """The fit on all text, damped as far as helps on the rows held back from it most.

    Args:
        text: of most rows.
        held: of the others; no tokens where there are too few rows.
        damp: what is taken in any case; None: found out.
        bias: whether there is one.
        mask: bool [out, in], where a pruned weight is not zero and may change; None: everywhere.

    Returns:
        What to add to the weight and the bias; None: whatever is fitted makes it worse on the rows held back.
    """
    if held.tokens and damp is None:
        scores = {share: held.left(*text.fitted(share, bias=bias, mask=mask)) for share in DAMPS}
        damp = min(DAMPS, key=lambda share: scores[share])
        if not scores[damp] < held.size:
            return None
    return text.joined(held).fitted(damp or USUAL, bias=bias, mask=mask)


def repair(block: Block, made: Made, hidden: Hidden, groups: GroupCompressor, plan: Repair) -> float:
    """Fit the matrices of a block that `plan` names, each with those before it fitted, and take them over into `made`.

    Args:
        block: of the smaller model; the original's states have left what it stands for.
        made: what is to be written of it.
        hidden: the states of both models.
        groups: writes what is fitted.
        plan: which matrices, with which damping.

    Returns:
        The mean squared difference, before anything was fitted, between what leaves the block and what should.
    """
    fitter = _Fitter(block, made, hidden, plan)
    model = hidden.model
    model.load_block(block.index, made.decoded)
    before = difference(block, hidden)
    straight = fitter.straight()
    if not straight and len(hidden.batches):
        what = "none of its linears writes straight to the states: what is fitted makes up for its own layer alone"
        made.events.append(Event("repair_limited", what, block.prefix))
    if len(hidden.batches) == 1:
        what = "there is one batch of calibration text, and none to hold back: whether a fit helps was not tried"
        made.events.append(Event("not_held_back", what, block.prefix))
    model.drop_block(block.index)
    for group in block.groups:
        matrices = [m for m in group.matrices if m in plan.matrices]
        if not matrices:
            continue
        for matrix, (text, held) in fitter.missing(group, matrices, straight).items():
            fitter.fit(text, held, matrix, groups)
        trim()
    return before


@torch.no_grad()
def repair_head(head: Matrix, made: Made, hidden: Hidden, groups: GroupCompressor, plan: Repair) -> None:
    """Fit a head that reads fewer channels than the original's, and take it over into `made`.

    What is missing of what it gives is what the original's head makes of y, less what it makes of x itself; so the
    second moments of both inputs are all that is needed of the text.
    """
    small, whole = hidden.model, hidden.original.model
    table = whole.anatomy.head
    assert table is not None
    zeros, width = partial(torch.zeros, device=small.device), head.shape[1]
    sums = [
        _Seen(zeros(width, width), zeros(table.shape[1], width)) for _ in range(2)
    ]  # of most rows, of those held back
    every = min(HELD, len(hidden.batches))
    for batch, tokens in enumerate(hidden.batches):
        x = small.head_input(tokens, hidden.states[batch]).reshape(-1, width).float()
        y = whole.head_input(tokens, hidden.originals[batch]).reshape(-1, table.shape[1]).float()
        sums[every > 1 and batch % every == every - 1].add(x, y)
    rows, own = whole.weights.rows(table.key), small.weights.rows(head.key)
    fitted = torch.empty(head.shape, dtype=head.dtype, device=small.device)
    helped = False
    for start in range(0, head.shape[0], HEAD_ROWS):
        part = slice(start, start + HEAD_ROWS)
        before, right = (get(part).float().to(small.device) for get in (own, rows))
        text, held = (one.missing(before, right) for one in sums)
        found = best_fit(text, held, plan.damp, bias=False)
        fitted[part] = (before if found is None else before.double() + found[0]).to(head.dtype)
        helped |= found is not None
    if not helped:
        what = "what can be fitted makes it worse on rows held back: its weights stay as they were"
        made.events.append(Event("not_repaired", what, head.name))
        return
    groups.replace(made, head, Dense(fitted))


@dataclass
class _Seen:
    """Sums over tokens of the inputs x of a head and y of the original's; float32."""

    square: Tensor  # of x x^T [in, in]
    cross: Tensor  # of y x^T [whole in, in]
    tokens: int = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add a batch [tokens, in] and [tokens, whole in]."""
        self.tokens += len(x)
        self.square.addmm_(x.T, x)
        self.cross.addmm_(y.T, x)

    def missing(self, own: Tensor, right: Tensor) -> Missing:
        """What is missing of some outputs, by their rows of both heads; its size, which no fit changes, is left out."""
        rest = right @ self.cross - own @ self.square
        mean, means = (torch.zeros(n, device=own.device) for n in (own.shape[1], len(own)))
        return Missing(self.square, rest, mean, means, tokens=self.tokens)


class _Fitter:
    """Fits one block."""

    def __init__(self, block: Block, made: Made, hidden: Hidden, plan: Repair) -> None:
        self._block, self._made, self._hidden, self._plan = block, made, hidden, plan
        self._model, self._original = hidden.model, hidden.original
        self._whole = self._original.model.anatomy.blocks[self._original.blocks[block.index]]

    def _linear(self, matrix: Matrix) -> nn.Module:
        linear: nn.Module = self._model.model.get_submodule(matrix.site.module)
        return linear

    def _twin(self, matrix: Matrix) -> nn.Module:
        """The same linear of the original's block."""
        name = f"{self._whole.prefix}{matrix.site.module.removeprefix(self._block.prefix)}"
        linear: nn.Module = self._original.model.model.get_submodule(name)
        return linear

    def straight(self) -> dict[Matrix, float]:
        """What writes to the states between blocks, the last first, and the factor with which it is added.

        The block is loaded.
        """
        found: dict[Matrix, float] = {}
        candidates = [m for g in self._block.groups for m in g.matrices if m in self._plan.matrices]
        wide = [m for m in candidates if m.shape[0] == self._model.hidden]
        for matrix in reversed(wide):
            if (factor := self._factor(matrix, list(found))) is not None:
                found[matrix] = factor
        return found

    @torch.no_grad()
    def _factor(self, matrix: Matrix, silent: list[Matrix]) -> float | None:
        """What something added to a linear's output is multiplied by where it leaves the block; None: it is changed."""
        change = torch.empty(0)

        def push(_: nn.Module, __: object, out: Tensor) -> Tensor:
            return out + change.to(out.dtype).view(out.shape)

        with _hooked({self._linear(m): lambda _m, _a, out: torch.zeros_like(out) for m in silent}):
            plain = self._hidden.run(self._block.index, 0)
            # As large as the states themselves: what is added must not drown in their rounding.
            generator = torch.Generator().manual_seed(0)
            change = torch.randn(plain.shape, generator=generator).to(plain.device) * plain.float().std()
            with _hooked({self._linear(matrix): push}):
                moved = self._hidden.run(self._block.index, 0)
        pushed, seen = (t.double().flatten()[: TRIED * self._model.hidden] for t in (change.to(plain.dtype), moved))
        seen = seen - plain.double().flatten()[: len(seen)]
        size = float(pushed.square().sum())
        factor = float(pushed @ seen) / size if size else 0.0
        off = float((seen - factor * pushed).square().sum())
        allowed = STRAIGHT + ROUNDINGS * torch.finfo(plain.dtype).eps
        return factor if factor and off <= (allowed * factor) ** 2 * size else None

    @torch.no_grad()
    def missing(
        self, group: Group, matrices: list[Matrix], straight: dict[Matrix, float]
    ) -> dict[Matrix, tuple[Missing, Missing]]:
        """What is missing of the outputs of a group's linears, over most batches, and over those held back."""
        hidden, index = self._hidden, self._block.index
        last = next(iter(straight), None)
        none = partial(Missing.none, device=self._model.device)
        found, seen = {m: (none(m.shape), none(m.shape)) for m in matrices}, threading.local()
        others = [m for m in matrices if m is not last]
        self._model.load_block(index, self._made.decoded)
        if others:
            self._original.model.load_block(self._whole.index)

        def keep(name: str, end: bool) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def look(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
                setattr(seen, name, (args[0], out))
                if end:
                    raise _Enough

            return look

        turns, every = Turns(len(hidden.batches)), min(HELD, len(hidden.batches))

        def job(batch: int) -> None:
            with turns.taking_part(batch):
                out = None
                with suppress(_Enough):
                    out = hidden.run(index, batch)
                with suppress(_Enough):
                    if others:
                        hidden.run_original(index, batch)
                rest = {m: self._rest(m, seen, straight, batch, out) for m in matrices}
                x = getattr(seen, f"own {matrices[0].key}")[0]
                with turns.turn(batch, group):  # sums that always round alike
                    for matrix, sums in found.items():
                        sums[every > 1 and batch % every == every - 1].add(
                            x.reshape(-1, x.shape[-1]).float(), rest[matrix]
                        )

        hooks = {self._linear(m): keep(f"own {m.key}", m is matrices[-1] and last not in matrices) for m in matrices}
        hooks |= {self._twin(m): keep(f"right {m.key}", m is others[-1]) for m in others}
        with _hooked(hooks):
            for _ in side_by_side(self._model.device, job, len(hidden.batches)):
                pass
        self._model.drop_block(index)
        if others:
            self._original.model.drop_block(self._whole.index)
        return found

    def _rest(
        self,
        matrix: Matrix,
        seen: threading.local,
        straight: dict[Matrix, float],
        batch: int,
        out: Tensor | None,
    ) -> Tensor:
        """What is missing of one linear's output [tokens, out]; `out` is what leaves the block."""
        if matrix is next(iter(straight), None):
            assert out is not None
            rest = (self._hidden.aim(batch) - out) / straight[matrix]
        else:
            own, right = (getattr(seen, f"{which} {matrix.key}")[1] for which in ("own", "right"))
            kept = self._plan.rows.get(matrix)
            rest = (right if kept is None else right.index_select(-1, kept.to(right.device))) - own
            if matrix in straight:
                entered = self._hidden.entered[batch].to(own.device)
                state = self._hidden.states[batch].to(own.device)
                rest = rest + (self._original.seen(entered) - state) / straight[matrix]
        return rest.reshape(-1, matrix.shape[0]).float()

    def fit(self, text: Missing, held: Missing, matrix: Matrix, groups: GroupCompressor) -> None:
        """Take the fitted weight and bias of one linear over into what is to be written."""
        bias = self._plan.biases.get(matrix)
        weight = self._made.decoded[matrix.key].weight().to(self._model.device)
        mask, damp = kept_before(weight), self._plan.damp
        if not text.size or (found := best_fit(text, held, damp, bias=bias is not None, mask=mask)) is None:
            if text.size:
                what = "what can be fitted makes it worse on rows held back: its weights stay as they were"
                self._made.events.append(Event("not_repaired", what, matrix.name))
            return
        added, shift = found
        form = Dense((weight.double() + added).to(matrix.dtype))
        groups.replace(self._made, matrix, form)
        if matrix in self._made.forms:  # it is learned afterwards
            self._made.forms[matrix] = form
        if bias is not None and shift is not None:
            stored = self._made.tensors[bias]
            new = (stored.to(shift.device).double() + shift).to(stored.dtype).to(stored.device)
            self._made.tensors[bias] = new
            self._made.decoded[bias] = Decoded(lambda: new)


@contextmanager
def _hooked(hooks: Mapping[nn.Module, Callable[..., object]]) -> Iterator[None]:
    """With these hooks on what modules give out."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
