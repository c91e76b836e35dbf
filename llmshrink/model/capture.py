"""The pass-through recorder: what each block is called with, without running any block.

One forward pass of the model in which every block hands its input on unchanged. The model itself computes embeddings,
masks and position tables, so no family needs code here. Recorded arguments are then used to run the real blocks one by
one; replacing the last block's result and letting the model go on gives its exact output.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmshrink.errors import PlanError

RETURNS = (None, 1, 2, 3)
MORE = object()  # stands for what blocks return beside the hidden state: attentions, a state


class _Stop(Exception):  # noqa: N818 - control flow, never seen outside
    pass


@dataclass(frozen=True)
class Record:
    """The input of the first block [rows, length, hidden], and the other arguments of every block."""

    hidden: Tensor
    arguments: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]

    def run(self, block: nn.Module, index: int, hidden: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
        """Run the block at `index` on a batch of the recorded shape, with these `parameters` in place of its own."""
        args, kwargs = self.arguments[index]
        lent = partial(torch.func.functional_call, block, parameters) if parameters else None
        out = block(hidden, *args, **kwargs) if lent is None else lent((hidden, *args), kwargs)
        result: Tensor = out if isinstance(out, Tensor) else out[0]
        return result


class Recorder:
    """Replaces the forward of each block for as long as it is open; the block objects stay what they are."""

    def __init__(self, model: PreTrainedModel, blocks: list[nn.Module], returns: int | None = None) -> None:
        """`returns` is how long a tuple the blocks return (None: a tensor): `record` finds it out, `finish` cannot."""
        self._model = model
        self._blocks = blocks
        self.returns = returns

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for block in self._blocks:
            block.__dict__.pop("forward", None)

    @torch.no_grad()
    def record(self, **inputs: Tensor) -> Record:
        """Record one batch: `input_ids` [rows, length], or `inputs_embeds` [rows, length, hidden].

        Raises:
            PlanError: blocks are not called one after another on a hidden state.
        """
        failures = []
        for returns in dict.fromkeys((self.returns, *RETURNS)):
            self.returns = returns
            try:
                return self._record(inputs)
            except (_Mismatch, TypeError, ValueError, AttributeError, IndexError) as error:
                failures.append(error)
        # What blocks do hand on says more than which length of a tuple does not suit the model.
        first = next((error for error in failures if isinstance(error, _Mismatch)), failures[0])
        raise PlanError(f"{type(self._model).__name__}: its blocks cannot be run one by one: {first}") from first

    def _record(self, inputs: dict[str, Tensor]) -> Record:
        calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

        def stub(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if calls and hidden is not calls[-1][0]:
                raise _Mismatch("a block does not get the very tensor that the one before it returned")
            if any(value is MORE for value in (*args, *kwargs.values())):
                raise _Mismatch("a block hands the next one more than a hidden state")
            calls.append((hidden, args, kwargs))
            if len(calls) == len(self._blocks):
                raise _Stop
            return self._result(hidden)

        self._patch([stub] * len(self._blocks))
        try:
            self._model(**inputs, use_cache=False)
        except _Stop:
            pass
        finally:
            self._restore()
        if len(calls) != len(self._blocks):
            raise _Mismatch(f"{len(self._blocks)} blocks, but {len(calls)} calls")
        for _, args, kwargs in calls:
            if args and args[0] is not None and not isinstance(args[0], Tensor | tuple):
                raise _Mismatch("a block is handed a cache")
            if kwargs.get("past_key_values") is not None or kwargs.get("layer_past") is not None:
                raise _Mismatch("a block is handed a cache")
        return Record(calls[0][0], tuple((a, k) for _, a, k in calls))

    def finish(self, tokens: Tensor, hidden: Tensor, parameters: dict[str, Tensor] | None = None) -> Any:
        """What the model returns for the last block's output, through its own norm and head.

        Gradients are kept where `parameters` are given, which stand in for its own.
        """

        def pass_on(h: Tensor, *args: Any, **kwargs: Any) -> Any:
            return self._result(h)

        def last(h: Tensor, *args: Any, **kwargs: Any) -> Any:
            return self._result(hidden)

        self._patch([pass_on] * (len(self._blocks) - 1) + [last])
        try:
            inputs = {"input_ids": tokens, "use_cache": False}
            if parameters is not None:
                with torch.enable_grad():
                    return torch.func.functional_call(self._model, parameters, (), inputs)
            with torch.no_grad():
                return self._model(**inputs)
        finally:
            self._restore()

    def _result(self, hidden: Tensor) -> Any:
        return hidden if self.returns is None else (hidden, *[MORE] * (self.returns - 1))

    def _patch(self, forwards: list[Any]) -> None:
        for block, forward in zip(self._blocks, forwards, strict=True):
            block.__dict__["forward"] = forward

    def _restore(self) -> None:
        for block in self._blocks:
            block.__dict__.pop("forward", None)


class _Mismatch(Exception):  # noqa: N818
    pass
