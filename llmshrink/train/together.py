"""What processes that train together agree on, and weights that lie in shards on all of them (FSDP 2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed import ReduceOp, all_reduce, barrier, is_initialized
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from llmshrink import ranks
from llmshrink.errors import InterruptedRun, UsageError

LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "NCCL error")


def check_wrappers(trainer: Trainer) -> None:
    """Refuse what no loss here has been made for.

    Raises:
        UsageError: the launcher asks for it.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if ranks.sharded() and trainer.accelerator.distributed_type != DistributedType.FSDP:
        raise UsageError(
            "FSDP was asked for, and accelerate shards nothing on a CPU.", hint="Launch without --use_fsdp."
        )
    if plugin is not None and plugin.fsdp_version != 2:
        raise UsageError("FSDP 1 is not supported: it flattens weights.", hint="Launch with --fsdp_version 2.")
    if getattr(trainer.accelerator.state, "deepspeed_plugin", None) is not None:
        raise UsageError("DeepSpeed is not supported.", hint="Launch with --use_fsdp --fsdp_version 2.")


def check_wrapped(model: nn.Module) -> None:
    """Make sure that several processes train one model.

    Raises:
        RuntimeError: each would train its own.
    """
    if ranks.count() > 1 and not isinstance(model, DistributedDataParallel | FSDPModule):
        raise RuntimeError(f"gradients of {type(model).__name__} are not exchanged between {ranks.count()} processes")


def anywhere(device: torch.device, *flags: bool) -> list[bool]:
    """Of each flag, whether it is set in any of the processes."""
    if ranks.count() == 1:
        return list(flags)
    found = torch.tensor(flags, dtype=torch.int32, device=device)
    all_reduce(found, ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]


def wait_for_all() -> None:
    """Go on once all processes have come here."""
    if ranks.count() > 1:
        barrier()


@contextmanager
def missing_none() -> Iterator[None]:
    """Say in plain words that another process is gone.

    Raises:
        InterruptedRun: it is.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_initialized() or not any(words in str(error) for words in LOST):
            raise
        raise InterruptedRun(
            "Another process of this run has ended; what it said is above.",
            hint="The same command goes on from the last saved state.",
        ) from error


# --- shards


def gather(modules: Iterable[nn.Module]) -> None:
    """Let each process hold the whole weights of modules that are sharded, until gradients have come back to them."""
    for module in modules:
        if isinstance(module, FSDPModule):
            module.unshard()


@contextmanager
def unhooked(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Call sharded modules without the hooks that gather their weights and wait for their gradients.

    Gradients that are made within a forward pass would make these let go of the weights, and exchange nothing.
    """
    sharded = [module for module in modules if isinstance(module, FSDPModule)]
    hooks = [(module._forward_pre_hooks, module._forward_hooks) for module in sharded]
    try:
        for module in sharded:
            module._forward_pre_hooks, module._forward_hooks = type(hooks[0][0])(), type(hooks[0][1])()
        yield
    finally:
        for module, (before, after) in zip(sharded, hooks, strict=True):
            module._forward_pre_hooks, module._forward_hooks = before, after


def make_whole(model: nn.Module) -> None:
    """Put whole weights on the CPU of the first process in the place of shards, which are given up; all must call it.

    What is tied stays tied, and modules are of their own classes again, without the hooks of FSDP; none are trained any
    more. A model that is not sharded stays as it is.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()
            module.__class__ = type(module).__bases__[1]  # FSDP makes a class of (FSDPModule, what it was)
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                if id(parameter) not in made:
                    made[id(parameter)] = _whole(parameter)
                module._parameters[name] = made[id(parameter)]
    if made:
        model.to("cpu")  # buffers


def _whole(parameter: DTensor) -> nn.Parameter:
    full = parameter.full_tensor().detach()
    kept = full.cpu() if ranks.first() else full.new_empty(0, device="cpu")
    return nn.Parameter(kept, requires_grad=parameter.requires_grad)
