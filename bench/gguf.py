"""KL of GGUF mixes beside llama.cpp's own encoders: the same model, types and bytes, all in one run.

    python -m bench.gguf --shared ../shared --ggml LIBRARY [--model lab8m] [--mixes Q4_K_M Q3_K_M Q2_K Q6_K]

LIBRARY is a shared library that exports `ggml_quantize_chunk`, by which llama.cpp's `llama_model_quantize` encodes each
tensor: the xllamacpp wheel has one (xllamacpp.abi3.so). Its importance matrix is the mean square of each input on the
same calibration rows, taken of the original model, as `llama-imatrix` does. Every file is scored by `llmshrink eval`.
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bench.peers import EVALUATION_ROWS, MODELS
from llmshrink import run
from llmshrink.calibration.rows import tokenize
from llmshrink.calibration.text import documents
from llmshrink.gguf.blueprint import draw
from llmshrink.gguf.checkpoint import SINGLE
from llmshrink.model.source import open_source
from llmshrink.progress import Silent
from llmshrink.recipe.load import validate
from llmshrink.statistics import Norm


class Ggml:
    """llama.cpp's encoders."""

    def __init__(self, library: Path) -> None:
        self._quantize = ctypes.CDLL(str(library)).ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        self._quantize.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]

    def encode(self, weight: Tensor, name: str, importance: Tensor | None) -> Tensor:
        """uint8 [out, bytes of a row] of a matrix [out, in]; `importance` [in] weights its errors."""
        kind = gguf.GGMLQuantizationType[name]
        size, width = gguf.GGML_QUANT_SIZES[kind]
        x = np.ascontiguousarray(weight.float().numpy())
        out = np.zeros((x.shape[0], x.shape[1] // size * width), np.uint8)
        squares = None if importance is None else np.ascontiguousarray(importance.float().numpy())
        at = None if squares is None else squares.ctypes.data
        written = self._quantize(int(kind), x.ctypes.data, out.ctypes.data, 0, *x.shape, at)
        assert written == out.nbytes, (name, written, out.nbytes)
        return torch.from_numpy(out)


@torch.no_grad()
def importance(model: Path, rows: Tensor) -> dict[str, Tensor]:
    """The mean square of each input of every linear, by the key of its weight."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found: dict[str, Norm] = {}
    for name, module in loaded.named_modules():
        if isinstance(module, nn.Linear):
            norm = found[f"{name}.weight"] = Norm(module.in_features, torch.device("cpu"))
            module.register_forward_pre_hook(lambda _, args, norm=norm: norm.update(args[0].flatten(0, -2)))
    for batch in torch.split(rows, 8):
        loaded(batch)
    for norm in found.values():
        norm.finish()
    return {key: norm.square for key, norm in found.items()}


def encoded_by_llama_cpp(ours: Path, model: Path, out: Path, ggml: Ggml, squares: dict[str, Tensor]) -> Path:
    """The folder `ours` once more, with every block encoded by llama.cpp."""
    shutil.copytree(ours, out, ignore=shutil.ignore_patterns(SINGLE))
    source, made = open_source(str(model)), open_source(str(ours)).checkpoint
    tensors: dict[str, Tensor] = {}
    for key in made.infos:
        dense, _, kind = key.rpartition(".")
        quantized = kind in gguf.GGMLQuantizationType.__members__ and made.infos[key].dtype == torch.uint8
        tensors[key] = (
            ggml.encode(source.checkpoint.get(dense), kind, squares.get(dense)) if quantized else made.get(key)
        )
    blueprint = draw(source.config, source.tokenizer, tensors, type=None, name=model.name)
    blueprint.write(out / SINGLE, tensors.__getitem__)
    return out


def calibration_rows(model: Path, shared: Path, facts: dict[str, Any]) -> Tensor:
    """Token ids [rows, length] that our run is calibrated on too."""
    text = documents(str(shared / "data" / f"{facts['calibration']}.json"), seed=0, split="train")
    tokenizer, packed = open_source(str(model)).tokenizer, not facts.get("each", False)
    rows = tokenize(text, tokenizer, rows=facts["rows"], length=facts["length"], packed=packed, data="calibration")
    return torch.cat(rows.batches(1 << 16))


def settings(model: Path, shared: Path, facts: dict[str, Any]) -> dict[str, Any]:
    data = [str(shared / "data" / f"{name}.json") for name in facts["texts"]]
    each = {"length": facts["length"], "packed": not facts.get("each", False)}
    return {
        "version": 1,
        "model": {"id": str(model)},
        "calibration": {"data": str(shared / "data" / f"{facts['calibration']}.json"), "samples": facts["rows"]}
        | {"length": facts["length"]},
        "evaluation": {"data": data, "rows": EVALUATION_ROWS[model.name], "speed": False, **each},
    }


def score(base: dict[str, Any], folder: Path) -> list[float]:
    """KL to the original on each text."""
    recipe = {**base, "stages": [{"task": "eval"}], "model": {"id": str(folder)}}
    recipe["evaluation"] = {**base["evaluation"], "baseline": base["model"]["id"]}
    after = run.execute(validate(recipe), progress=Silent()).after
    assert after is not None
    return [text.kl or 0.0 for text in after.scores]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--ggml", type=Path, required=True)
    parser.add_argument("--model", choices=MODELS, default="lab8m")
    parser.add_argument("--mixes", nargs="+", default=["Q4_K_M", "Q3_K_M", "Q2_K", "Q6_K"])
    args = parser.parse_args()
    model, facts, ggml = args.shared / "models" / args.model, MODELS[args.model], Ggml(args.ggml)
    base = settings(model, args.shared, facts)
    squares = importance(model, calibration_rows(model, args.shared, facts))
    print(f"| mix | file bytes | encoder | {' | '.join(f'KL {name}' for name in facts['texts'])} |")
    print("|---|--:|---" + "|--:" * len(facts["texts"]) + "|")
    for mix in args.mixes:
        with tempfile.TemporaryDirectory() as folder:
            made = {}
            for method in ("gptq", "rtn"):
                out = made[f"llmshrink {method}"] = Path(folder) / method
                stage = {"task": "quantize", "method": {"name": method}, "format": {"name": "gguf", "type": mix}}
                quiet = {**base["evaluation"], "data": []}
                recipe = {**base, "stages": [stage], "output": str(out), "evaluation": quiet}
                run.execute(validate(recipe), progress=Silent())
            for label, weights in (("llama.cpp", {}), ("llama.cpp, importance matrix", squares)):
                out = Path(folder) / label.replace(" ", "-")
                made[label] = encoded_by_llama_cpp(made["llmshrink rtn"], model, out, ggml, weights)
            for label, out in made.items():
                kls = " | ".join(f"{kl:.5f}" for kl in score(base, out))
                print(f"| {mix} | {(out / SINGLE).stat().st_size} | {label} | {kls} |", flush=True)


if __name__ == "__main__":
    main()
