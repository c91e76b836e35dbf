"""The model without its weights: modules with parameters on `meta` and real buffers.

Buffers (rotary tables, embedding scales) are computed by the constructors and are not in the checkpoint, so the whole
model must not simply be built on `meta`. Building it this way takes about a second for a model of 8 B parameters and
next to no memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from llmshrink.errors import InputError, LlmshrinkError, PlanError
from llmshrink.io.safetensors import TensorInfo
from llmshrink.model.task import task_of

TENSOR = 1000  # weights that a tensor counts for whatever its size: a million empty layers take their time too
EXPERTS = "llmshrink"  # our implementation of fused experts, which lets an observer see each expert's inputs


@contextmanager
def _parameters_on_meta(room: float) -> Iterator[None]:
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal room
        if parameter is not None:
            room -= parameter.numel() + TENSOR
            if room < 0:
                raise InputError(
                    "config.json describes a model many times larger than the weights beside it.",
                    hint="The weights and config.json do not belong together.",
                )
            if parameter.device.type != "meta":
                parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
            # Else transformers draws random numbers for it, on `meta` too: a second for 30 blocks. The mark is its own,
            # which torch's type of a parameter does not have.
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def room_of(infos: Mapping[str, TensorInfo]) -> int:
    """More weights than these tensors can hold: 16 for each byte, one bit for each and tied ones counted twice."""
    return sum(16 * info.bytes + 4 * TENSOR for info in infos.values())


def build(
    config: PretrainedConfig, dtype: torch.dtype, *, room: float = math.inf, all_meta: bool = False
) -> PreTrainedModel:
    """A model in eval mode whose parameters lie on `meta`; with `all_meta`, the buffers too.

    Args:
        config: what to build; a stranger wrote it.
        dtype: of the parameters.
        room: weights that it may have at most, as `room_of` gives them.
        all_meta: take no memory at all.

    Raises:
        PlanError: what the model is for is not supported, or transformers has no class for it.
        InputError: the configuration describes no model, or not this one.
    """
    task = task_of(config)
    config = deepcopy(config)  # it is changed by what is built from it
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the skeleton is that of the dense model
    try:
        with _parameters_on_meta(room), torch.device("meta") if all_meta else nullcontext():
            model: PreTrainedModel = task.loader.from_config(config, dtype=dtype, trust_remote_code=False)
    except LlmshrinkError:
        raise
    except (ValueError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        if reason.startswith("Unrecognized configuration class"):
            reason = "it has no such class"  # in place of a list of all it has
        raise PlanError(f"transformers builds no {task.name} model of {config.model_type!r}: {reason}.") from error
    except Exception as error:  # noqa: BLE001 - constructors of 400 families, given any numbers
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(f"config.json describes no model that can be built ({reason}).") from error
    fused = [module for module in model.modules() if hasattr(module, "is_transposed")]
    if any(module.is_transposed or module.has_bias or module.has_post_expert_norm for module in fused):
        what = "transposed, or have biases or norms"
        raise PlanError(f"{type(model).__name__}: its fused experts are {what}: not supported yet.")
    if fused:
        model.set_experts_implementation(EXPERTS)
    return model.eval()


def experts_forward(self: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Fused experts one after another, the way the eager implementation does it.

    `self.observer` sees the inputs of each, `self.rounder` gives what the linear multiplies in their place, and
    `self.witness` sees what each adds.

    hidden [tokens, H]; top_k_index and top_k_weights [tokens, k]. Registered with transformers under `EXPERTS`.
    """
    observer, rounder, witness = (getattr(self, name, None) for name in ("observer", "rounder", "witness"))
    first = "gate_up_proj" if self.has_gate else "up_proj"
    activate: Any = self._apply_gate if self.has_gate else self.act_fn
    out = torch.zeros_like(hidden)
    for expert in range(self.num_experts):  # type: ignore[arg-type]
        if hidden.device.type == "meta":  # which tokens an expert gets depends on data: its shapes do not matter here
            token, slot = torch.arange(0, device="meta"), torch.arange(0, device="meta")
        else:
            token, slot = torch.where(top_k_index == expert)
        x = hidden[token]
        if observer:
            observer(expert, first, x)
        if rounder:
            x = rounder(expert, first, x)
        x = activate(nn.functional.linear(x, getattr(self, first)[expert]))
        if observer:
            observer(expert, "down_proj", x)
        if rounder:
            x = rounder(expert, "down_proj", x)
        x = nn.functional.linear(x, self.down_proj[expert]) * top_k_weights[token, slot, None]  # type: ignore[index]
        if witness:
            witness(expert, x)
        out.index_add_(0, token, x.to(out.dtype))
    return out


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts_forward)


def set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer, e.g. the one on `meta`."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value


def drop_parameters(model: nn.Module, names: list[str]) -> None:
    """Send parameters back to `meta`, freeing their memory."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if (parameter := module._parameters.get(leaf)) is not None:
            module._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)
