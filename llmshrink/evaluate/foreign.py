"""The part of the foreign reader that runs in the child: transformers, and what it says about a folder."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.llama import modeling_llama

from llmshrink.bottleneck import BottleneckModel, is_bottleneck
from llmshrink.errors import InputError
from llmshrink.evaluate.reader import Found, ReadRequest, ReadResult
from llmshrink.gguf.checkpoint import SINGLE as GGUF
from llmshrink.memory import PeakMonitor, resident_bytes
from llmshrink.model.source import Source, forget_kernels
from llmshrink.model.task import SEQUENCES, Task, positions, task_of

# Naming the modules imports them: transformers is lazy, and the server should pay, not each of its children.
IMPORTED = (modeling_auto, modeling_llama)
QUANTIZERS = {"compressed-tensors": "compressed_tensors", "bitsandbytes": "bitsandbytes"}  # quant_method -> package

PREFILL_TOKENS = 128
DECODE_TOKENS = 32
RUNS = 3  # after a short one to warm up
ENOUGH_SECONDS = 20.0  # no further run after this long: big models on a CPU


def read(request: ReadRequest) -> ReadResult:
    """Load a folder offline, without remote code, and measure what the request asks for."""
    if not (Path(request.folder) / "config.json").is_file():
        raise InputError(f"{request.folder} holds no config.json: it is not a model folder")
    config, task = _prepare(request.folder)
    if request.classes is not None:
        task, config.num_labels = SEQUENCES, request.classes
    # With the configuration that stands beside a GGUF file: from the file itself it takes only a part of it.
    given = {"gguf_file": GGUF} if Source(request.folder, Path(request.folder), None).gguf else {}
    with PeakMonitor(torch.device(request.device), probe=resident_bytes) as memory, torch.inference_mode():
        start = time.perf_counter()
        model, info = task.loader.from_pretrained(
            request.folder,
            config=config,
            **given,
            dtype=request.dtype,
            device_map={"": request.device},  # bitsandbytes would take a GPU by itself
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,  # never the pickle that may lie beside
            output_loading_info=True,
            **_in_four_bits(request),
        )
        if request.adapter is not None:
            model = _adapted(model, request.adapter)
        model.eval()
        if request.dtype == "float32":
            compute_in_float32(model)
        if not request.round_inputs:
            keep_inputs(model)
        seconds = time.perf_counter() - start
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=request.device))
        after = loaded_bytes(model)
        output = _output(model, task, request.tokens)
        sample = _sample(model, request) if task.causal else None
        prefill, decode = _speed(model, task, request) if request.speed else (None, None)
    found = Found(
        class_name=type(model).__name__,
        missing=_names(info["missing_keys"]),
        unexpected=_names(info["unexpected_keys"]),
        mismatched=_names(info["mismatched_keys"]),
        load_seconds=seconds,
        loaded_bytes=after,
        peak_bytes=memory.above_base_bytes,
        device_bytes=memory.device_bytes,
        output_shape=None if output is None else list(output.shape),
        prefill_tokens_per_second=prefill,
        decode_tokens_per_second=decode,
        sample=sample,
    )
    return ReadResult(found=found, output=output)


def _in_four_bits(request: ReadRequest) -> dict[str, Any]:
    if request.nested is None:
        return {}
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=request.nested
    )
    return {"quantization_config": settings}


def _adapted(model: PreTrainedModel, adapter: str) -> nn.Module:
    """With an adapter beside it, by plain peft; by llmshrink where peft has no such kind."""
    if is_bottleneck(Path(adapter)):
        return BottleneckModel.from_pretrained(model, adapter)
    from peft import PeftModel  # seconds, which only readers of adapters should pay for

    if any(isinstance(module, nn.Linear) and not hasattr(module, "weight") for module in model.modules()):
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device))  # compressed-tensors decodes now
    found: nn.Module = PeftModel.from_pretrained(model, adapter)
    return found


def compute_in_float32(model: nn.Module) -> None:
    """What `dtype=float32` does not reach: with bitsandbytes a model keeps the dtypes of the file and of its config.

    On a CPU with bfloat16 instructions its 4-bit linears multiply in bfloat16, whatever they are told.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - a plain attribute of Linear4bit
        for parameter in module.parameters(recurse=False):
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                state.dtype = torch.float32
                setattr(module, "compute_dtype", torch.float32)  # noqa: B010 - a plain attribute of Linear4bit
            elif parameter.is_floating_point():
                parameter.data = parameter.data.float()


def keep_inputs(model: nn.Module) -> None:
    """Let linears multiply their inputs as they are.

    compressed-tensors looks at this attribute in each forward; bitsandbytes multiplies decoded weights in training.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            module.train()
        if hasattr(module, "quantization_scheme"):
            setattr(module, "quantization_enabled", False)  # noqa: B010 - no attribute of nn.Module


def loaded_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, buffers and bitsandbytes tables; memory that several tensors share counts once."""
    tensors: list[Tensor] = [*model.buffers()]
    for parameter in model.parameters():
        tensors += [parameter.data, *_tables(getattr(parameter, "quant_state", None))]
    return sum({(t.device, t.data_ptr(), t.nbytes): t.nbytes for t in tensors}.values())


def _tables(state: Any) -> list[Tensor]:
    """Scales and levels of a bitsandbytes state, the nested one's too: they are neither parameters nor buffers."""
    if state is None:
        return []
    return [*(value for value in vars(state).values() if isinstance(value, Tensor)), *_tables(state.state2)]


def _prepare(folder: str) -> tuple[PretrainedConfig, Task]:
    """What the folder's model is, and is for; imports what loading it needs, whose time and memory are not its own."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if method in QUANTIZERS:
        importlib.import_module(QUANTIZERS[method])
    task = task_of(config)
    if type(config) in task.loader._model_mapping:
        _ = task.loader._model_mapping[type(config)]
    forget_kernels(config)
    return config, task


def _names(keys: Any) -> list[str]:
    """Sorted; a mismatched key comes as (name, shape on disk, shape in the model)."""
    return sorted(key if isinstance(key, str) else f"{key[0]}: {key[1:]}" for key in keys)


def _output(model: nn.Module, task: Task, rows: list[list[int]] | None) -> Tensor | None:
    """float32 [rows, T, width]; one row at a time, so that only their sum is large."""
    if rows is None:
        return None
    device = next(model.parameters()).device
    given = {} if task.by_row else {"use_cache": False}
    results = (model(input_ids=torch.tensor([row], device=device), **given) for row in rows)
    # Where something stands before the text, it gives something out too.
    return torch.cat([task.output(result)[:, -len(rows[0]) :].float().cpu() for result in results])


def _sample(model: PreTrainedModel, request: ReadRequest) -> str | None:
    if request.prompt is None:
        return None
    tokenizer = AutoTokenizer.from_pretrained(request.folder, local_files_only=True, trust_remote_code=False)
    new, _, _ = greedy(model, request.prompt, request.max_new_tokens)
    stop = new.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in new else len(new)
    return str(tokenizer.decode(new[:stop]))


def _speed(model: PreTrainedModel, task: Task, request: ReadRequest) -> tuple[float, float | None]:
    """Tokens per second of prefill and of decoding: medians, one row, greedy, with the KV cache.

    Where no next token is predicted, those of a forward pass and None.
    """
    longest = positions(model) or PREFILL_TOKENS + DECODE_TOKENS
    count = max(1, min(PREFILL_TOKENS, longest - DECODE_TOKENS if task.causal else longest))
    text = (request.tokens or [request.prompt or [0]])[0]
    prompt = (text * (count // len(text) + 1))[:count]
    if not task.causal:
        _one_pass(model, prompt)
        return count / median(_repeat(lambda: _one_pass(model, prompt))), None
    greedy(model, prompt, 2)
    runs = _repeat(lambda: greedy(model, prompt, DECODE_TOKENS))
    return count / median(run[1] for run in runs), (DECODE_TOKENS - 1) / median(run[2] for run in runs)


def _repeat(run: Callable[[], Any]) -> list[Any]:
    """The results of some runs: fewer of those that take long."""
    start = time.perf_counter()
    runs = [run()]
    while len(runs) < RUNS and time.perf_counter() - start < ENOUGH_SECONDS:
        runs.append(run())
    return runs


def _one_pass(model: PreTrainedModel, row: list[int]) -> float:
    """Seconds of a forward pass over one row."""
    tokens = torch.tensor([row], device=model.device)
    start = time.perf_counter()
    _ = next(iter(model(tokens).values())).sum().item()  # also waits for an accelerator
    return time.perf_counter() - start


def greedy(model: nn.Module, prompt: list[int], count: int) -> tuple[list[int], float, float]:
    """Continue a prompt by the most likely token, whatever the folder's generation_config says.

    Returns:
        `count` new tokens, the seconds for the prompt and the first of them, the seconds for all others.
    """
    device = next(model.parameters()).device
    step = torch.tensor([prompt], device=device)
    cache: Any = None
    new: list[int] = []
    times = [time.perf_counter()]
    for _ in range(count):
        out = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
        new.append(int(step.item()))  # also waits for an accelerator
        times.append(time.perf_counter())
    return new, times[1] - times[0], times[-1] - times[1]


__all__ = ["greedy", "loaded_bytes", "read"]
