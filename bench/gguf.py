"""GGUF beside llama.cpp: the same model, types and bytes, KL, time and perplexity, all in one run.

    python -m bench.gguf --shared ../shared --llamacpp PYTHON [--model lab8m] [--mixes Q4_K_M Q3_K_M Q2_K Q6_K Q8_0]

PYTHON runs llama-cpp-python, whose `llama_model_quantize` makes a file of each mix out of the same bfloat16 GGUF, with
and without an importance matrix: the mean square of each input on our calibration rows, taken of the original model, as
`llama-imatrix` does. Every file is scored by `llmshrink eval`. Then llama.cpp computes the logits of our GPTQ file, and
its perplexity is held against ours of the same file.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
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
from llmshrink.checks.written import streamed_output
from llmshrink.gguf.checkpoint import SINGLE
from llmshrink.gguf.names import family_of
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.progress import Silent
from llmshrink.recipe.load import validate
from llmshrink.statistics import Norm

SCRIPT = Path(__file__).with_name("llamacpp.py")
READ = 16  # rows that llama.cpp reads too


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


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp in an environment of its own."""

    python: Path

    def _call(self, *arguments: object) -> str:
        command = [str(self.python), str(SCRIPT), *map(str, arguments)]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout

    def quantize(self, dense: Path, ours: Path, out: Path, mix: str, imatrix: Path | None = None) -> float:
        """The folder `ours` with the file that llama.cpp makes of `dense` in place of its own; seconds on one core."""
        shutil.copytree(ours, out, ignore=shutil.ignore_patterns(SINGLE))
        more = [] if imatrix is None else [imatrix]
        return float(self._call("quantize", dense / SINGLE, out / SINGLE, mix, *more).split()[-1])

    def logits(self, folder: Path, rows: Tensor, work: Path) -> Tensor:
        """Float16 [rows, length, vocabulary]."""
        np.save(work / "rows.npy", rows.numpy().astype(np.int32))
        self._call("logits", folder / SINGLE, work / "rows.npy", work / "logits.npy")
        return torch.from_numpy(np.load(work / "logits.npy"))


def types(folder: Path) -> dict[str, str]:
    """The type of every tensor of a file."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(folder / SINGLE).tensors}


@torch.no_grad()
def perplexities(folder: Path, theirs: Tensor, rows: Tensor) -> tuple[float, float, float]:
    """Of a file: ours, llama.cpp's, and the mean KL(llama.cpp || ours) in nats per token."""
    model = StreamedModel(open_source(str(folder)), torch.device("cpu"))
    losses, kls = [], []
    for row, there in zip(rows, theirs, strict=True):
        p, q = there.double().log_softmax(-1), streamed_output(model, row[None])[0].double().log_softmax(-1)
        losses.append(torch.stack([-x[:-1].gather(1, row[1:, None].long()).mean() for x in (q, p)]))
        kls.append((p.exp() * (p - q)).sum(-1).mean())
    ours, others = torch.stack(losses).mean(0).exp().tolist()
    return ours, others, torch.stack(kls).mean().item()


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


def make(base: dict[str, Any], method: str, mix: str, out: Path) -> float:
    """A GGUF folder of ours; the seconds of the compress step."""
    stage = {"task": "quantize", "method": {"name": method}, "format": {"name": "gguf", "type": mix}}
    quiet = {**base["evaluation"], "data": []}
    recipe = {**base, "stages": [stage], "output": str(out), "evaluation": quiet, "run": {"threads": 1}}
    report = run.execute(validate(recipe), progress=Silent())
    return report.stages[0].seconds["compress"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--llamacpp", type=Path, required=True)
    parser.add_argument("--model", choices=MODELS, default="lab8m")
    parser.add_argument("--mixes", nargs="+", default=["Q4_K_M", "Q3_K_M", "Q2_K", "Q6_K", "Q8_0"])
    args = parser.parse_args()
    model, facts, peer = args.shared / "models" / args.model, MODELS[args.model], LlamaCpp(args.llamacpp)
    base = settings(model, args.shared, facts)
    rows = calibration_rows(model, args.shared, facts)
    print(f"| mix | tensors | made by | seconds | {' | '.join(f'KL {name}' for name in facts['texts'])} |")
    print("|---|--:|---|--:" + "|--:" * len(facts["texts"]) + "|")
    ends = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        make(base, "cast", "BF16", work / "dense")
        squares, imatrix = importance(model, rows), work / "imatrix.npz"
        llama_names = family_of(open_source(str(model)).config.model_type).name
        np.savez(imatrix, **{llama_names(key) or key: x.float().numpy() for key, x in squares.items()})
        for mix in args.mixes:
            made = {label: work / f"{mix}-{label}" for label in ("gptq", "rtn", "llama.cpp", "llama.cpp with imatrix")}
            seconds = {label: make(base, label, mix, made[label]) for label in ("gptq", "rtn")}
            for label, matrix in (("llama.cpp", None), ("llama.cpp with imatrix", imatrix)):
                seconds[label] = peer.quantize(work / "dense", made["rtn"], made[label], mix, matrix)
                like = "gptq" if matrix else "rtn"
                if types(made[label]) != types(made[like]):
                    print(f"{mix}: the types of {label} are not those of {like}")
            for label, out in made.items():
                size = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(out / SINGLE).tensors)
                kls = " | ".join(f"{kl:.5f}" for kl in score(base, out))
                print(f"| {mix} | {size} | {label} | {seconds[label]:.1f} | {kls} |", flush=True)
            ours, theirs, kl = perplexities(made["gptq"], peer.logits(made["gptq"], rows[:READ], work), rows[:READ])
            ends.append(f"| {mix} | {ours:.4f} | {theirs:.4f} | {100 * (theirs / ours - 1):+.3f} % | {kl:.1e} |")
    print("\n| mix | perplexity, our reading | llama.cpp's | difference | KL(llama.cpp \\|\\| ours) |")
    print("|---|--:|--:|--:|--:|", *ends, sep="\n")


if __name__ == "__main__":
    main()
