"""Which linears of a model get an adapter, whatever its family calls them."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel

from llmshrink import patterns
from llmshrink.errors import PlanError
from llmshrink.model.anatomy import Block, Matrix
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.adapters import Linears

SHOWN = 12  # names in a refusal


def find_linears(model: StreamedModel, target: list[str], *, apart: bool) -> Linears:
    """The linears that a recipe means.

    Args:
        model: whose they are.
        target: ends of names, or regular expressions over whole names; `auto`: all in the blocks.
        apart: whether those that narrow what is inside an MLP must be told from others by their names.

    Raises:
        PlanError: nothing has such a name (those there are, are listed), or no block has a linear.
    """
    there = [m for block in model.anatomy.blocks for m in block.matrices if m.kind != "experts"]
    if not there:
        raise PlanError(f"{model.source.id}: no block has a linear that an adapter could stand beside.")
    wanted = there if target == ["auto"] else _named(there, target)
    names = [m.module for m in wanted]
    wide = [m.module for m in wanted if m.shape[1] > model.hidden]
    short, *more = shortest([names, wide] if apart else [names], model.model)
    return Linears(short, more[0] if more else (), any(m.kind == "conv1d" for m in wanted))


def _named(there: list[Matrix], target: list[str]) -> list[Matrix]:
    found: dict[Matrix, None] = {}
    for pattern in target:
        means = [m for m in there if _ends(m.module, pattern) or patterns.matches(pattern, m.module)]
        if not means:
            kinds = dict.fromkeys(m.module.rpartition(".")[2] for m in there)
            shown = ", ".join(list(kinds)[:SHOWN])
            raise PlanError(
                f"target: no linear of a block is called {pattern!r}; there are: {shown}.",
                hint="Name the end of a module's name, a regular expression over whole names, or auto.",
            )
        found |= dict.fromkeys(means)
    return [m for m in there if m in found]


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def shortest(lists: list[list[str]], model: PreTrainedModel) -> list[tuple[str, ...]]:
    """For each list, the ends of its names that mean just these modules to peft, of one length; else whole names."""
    for depth in (1, 2):
        ends = [tuple(dict.fromkeys(".".join(name.split(".")[-depth:]) for name in names)) for names in lists]
        if all(_meant(model, own) == set(names) for own, names in zip(ends, lists, strict=True)):
            return ends
    return [tuple(names) for names in lists]


def _meant(model: PreTrainedModel, ends: tuple[str, ...]) -> set[str]:
    return {name for name, _ in model.named_modules() if any(_ends(name, end) for end in ends)}


def writers(model: StreamedModel) -> list[list[Matrix]]:
    """Of each block the linears that write to the states between blocks: that of attention, then that of the MLP.

    They are fed alone, and give out states.

    Raises:
        PlanError: a block has not these two.
    """
    found = [_writers(block, model.hidden) for block in model.anatomy.blocks]
    if short := [block for block, own in zip(model.anatomy.blocks, found, strict=True) if len(own) < 2]:
        raise PlanError(
            f"{model.source.id}: {short[0].prefix} has not two linears that write to the states between blocks, as an "
            "adapter needs.",
            hint="Take another method: lora stands beside any linear.",
        )
    return found


def _writers(block: Block, hidden: int) -> list[Matrix]:
    alone: Iterable[Matrix] = (g.matrices[0] for g in block.groups if len(g.matrices) == 1)
    return [m for m in alone if m.kind != "experts" and m.shape[0] == hidden]
