"""The model that an adapter is trained beside: whole in memory, as it is, in four bits, or decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, PreTrainedModel

from llmshrink.evaluate.foreign import compute_in_float32
from llmshrink.io.files import copy_file
from llmshrink.model.source import Source
from llmshrink.model.streamed import StreamedModel
from llmshrink.model.task import task_of
from llmshrink.plan.adapting import with_classes


def load_base(
    source: Source,
    device: torch.device,
    *,
    four_bits: bool = False,
    nested: bool = True,
    classes: tuple[str, ...] = (),
) -> PreTrainedModel:
    """A model that does not learn itself, in eval mode; in float32 on a CPU, in what it is stored in on a GPU.

    Args:
        source: what is loaded; where it is quantized by bitsandbytes it stays so, and by others it is decoded.
        device: where it computes.
        four_bits: hold its linears as NF4 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).
        nested: and their scales in 8 bits.
        classes: that it is to tell apart, by a head that is drawn where it has none; empty: it stays what it is.
    """
    config = source.config
    if source.quantization is not None and source.quantization.get("quant_method") != "bitsandbytes":
        whole = StreamedModel(source, device).whole(torch.float32, as_read=True)
        whole.config.use_cache = False
        return whole.requires_grad_(False).eval()
    dtype = torch.float32 if device.type == "cpu" else config.dtype or torch.float32
    given: dict[str, Any] = {}
    loader = task_of(config).loader
    if classes:
        loader, given["config"] = AutoModelForSequenceClassification, with_classes(config, classes)
    if four_bits:
        given["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=nested,
            bnb_4bit_compute_dtype=dtype,
        )
    model: PreTrainedModel = loader.from_pretrained(
        source.folder,
        dtype=dtype,
        device_map={"": str(device)},  # bitsandbytes would take a GPU by itself
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=True,
        **given,
    )
    if device.type == "cpu" or config.dtype is None:
        compute_in_float32(model)
    model.config.use_cache = False
    return model.requires_grad_(False).eval()


def decoded(model: PreTrainedModel) -> PreTrainedModel:
    """A model of bitsandbytes with its codes as floats; what read the codes is not there when it is saved."""
    whole: PreTrainedModel = model.dequantize()
    readers = getattr(whole, "_weight_conversions", None) or []
    whole._weight_conversions = [
        one for one in readers if not any(type(op).__name__.startswith("Bnb") for op in getattr(one, "operations", ()))
    ]
    return whole


def save_codes(model: PreTrainedModel, folder: Path, source: Source) -> None:
    """Write a model in four bits, what is no code in the dtype of where it came from, and the tokenizer of that."""
    dtype = source.config.dtype or torch.float32
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            state.dtype = dtype
        elif parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.config.use_cache, model.config.dtype = source.config.use_cache, dtype
    model.save_pretrained(folder)
    for name, path in source.companions.items():
        copy_file(path, folder / name)
