"""The one table of what loads where: format x kind of layer x runtime, with the reason.

Plan refusals, the report's `loads_in`, the README's table and the tests' matrix all come from here. `native` loads and
runs it as it is; `plugin` needs an add-on; `dense-only` loads, but decompresses into full-size weights; `no` does not.
Sources: transformers 5.23 (tried; tests/e2e); vLLM: compressed-tensors WNA16 scheme, the bitsandbytes plugin
(PR 43529) and the GGUF plugin (PR 39612).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Support = Literal["native", "plugin", "dense-only", "no"]
Kind = Literal["linear", "conv1d", "experts"]  # what holds a matrix in memory

RUNTIMES = ("transformers", "vllm", "llama.cpp")
KINDS: dict[Kind, str] = {
    "linear": "Llama and others built from nn.Linear",
    "conv1d": "GPT-2 (Conv1D)",
    "experts": "Qwen3-MoE (fused experts)",
}
_GGUF_ONLY = "it reads GGUF files only"


@dataclass(frozen=True)
class Entry:
    """How one runtime takes one format."""

    support: Support
    reason: str


def entry(format_name: str, kind: Kind, runtime: str, *, bits: int = 4, symmetric: bool = True) -> Entry:
    """The line of the table for one kind of layer."""
    if runtime == "llama.cpp":
        return Entry("no", _GGUF_ONLY)
    if format_name == "dense":
        return Entry("native", "plain weights")
    if format_name == "bnb":
        if kind == "experts":
            return Entry("no", "its loaders leave fused experts dense, so the file does not fit the model")
        if runtime == "vllm":
            return Entry("plugin", "needs vllm-bnb-plugin since vLLM 0.28")
        return Entry("native", "needs bitsandbytes")
    return _compressed_tensors(kind, runtime, bits, symmetric)


def _compressed_tensors(kind: Kind, runtime: str, bits: int, symmetric: bool) -> Entry:
    if kind == "conv1d":
        return Entry("no", "its loaders do not know Conv1D and would start from random weights")
    if not symmetric and kind == "experts":
        return Entry("no", "asymmetric codes of fused experts are not supported")
    if runtime == "transformers":
        return Entry("dense-only", "needs compressed-tensors >= 0.18; decompresses at the first forward pass")
    if symmetric and bits in (4, 8):
        return Entry("native", "WNA16 kernels")
    if symmetric:
        return Entry("native", "2 and 3 bits need a recent vLLM (humming kernels)")
    if bits in (4, 8):
        return Entry("native", "WNA16 kernels with zero points")
    return Entry("no", "asymmetric codes only with 4 or 8 bits")


def worst(format_name: str, kinds: Iterable[Kind], runtime: str, *, bits: Iterable[int], symmetric: bool) -> Entry:
    """The weakest entry over all layers of a model."""
    order = ("no", "plugin", "dense-only", "native")
    entries = [entry(format_name, k, runtime, bits=b, symmetric=symmetric) for k in sorted(kinds) for b in sorted(bits)]
    return min(entries, key=lambda e: order.index(e.support))


def markdown() -> str:
    """The README's table: format x family x runtime."""
    lines = ["| format | family | " + " | ".join(RUNTIMES) + " |", "|---" * (2 + len(RUNTIMES)) + "|"]
    for name in ("compressed-tensors", "bnb", "dense"):
        for kind, family in KINDS.items():
            cells = [entry(name, kind, runtime) for runtime in RUNTIMES]
            lines.append(f"| {name} | {family} | " + " | ".join(f"{c.support}: {c.reason}" for c in cells) + " |")
    return "\n".join(lines) + "\n"
