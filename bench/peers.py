"""Quality and time beside llm-compressor's and GPTQModel's GPTQ: same model, same calibration rows, one run.

    python -m bench.peers --shared ../shared --llmcompressor PYTHON --gptqmodel PYTHON
        [--model lab8m] [--settings 4:128 3:128 2:64]

Each PYTHON is the interpreter of an environment with that tool (they exclude each other, and ours). Every tool runs in
a process of its own with `--shared`'s script; its time is its own stopwatch from load to saved file, ours the compress
stage; whole-process time is given beside it. All outputs are then scored here by one function, row by row: KL to the
original in nats per token, and the ratio to the best peer with a paired bootstrap over rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from llmshrink.calibration.rows import Rows, tokenize
from llmshrink.calibration.text import documents
from llmshrink.evaluate.metrics import Scores, bootstrap_ratio

PEERS = {"llm-compressor": "peer_llmcompressor.py", "gptqmodel": "peer_gptqmodel.py"}
MODELS: dict[str, dict[str, Any]] = {
    "lab8m": {"length": 256, "rows": 128, "calibration": "calibration", "texts": ["tinystories", "gsm8k", "wikitext2"]},
    "stories260K": {
        "length": 512,
        "rows": 64,
        "calibration": "stories_calibration",
        "texts": ["stories"],
        "each": True,
    },
}
EVALUATION_ROWS = {"lab8m": 64, "stories260K": 200}


def run_peer(
    python: str, script: Path, model: Path, out: Path, bits: int, group: int, facts: dict[str, Any]
) -> dict[str, float]:
    """Run one of the shared scripts; its own seconds and those of the whole process."""
    command = [python, script.name, str(model), str(out), "--bits", str(bits), "--group", str(group)]
    command += ["--rows", str(facts["rows"]), "--length", str(facts["length"]), "--calibration", facts["calibration"]]
    command += ["--evaluation", facts["texts"][0], "--eval-rows", "1"]  # scored below, by one function for all
    start = time.perf_counter()
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2"}
    done = subprocess.run(command, cwd=script.parent, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script.name} failed:\n{done.stderr[-2000:]}")
    line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
    return {"seconds": json.loads(line)["seconds"], "process": time.perf_counter() - start}


def run_ours(model: Path, out: Path, bits: int, group: int, facts: dict[str, Any], shared: Path) -> dict[str, float]:
    """The command as a user types it, without evaluation."""
    command = [sys.executable, "-m", "llmshrink", "quantize", str(model), "--bits", str(bits), "-o", str(out)]
    command += ["--samples", str(facts["rows"]), "--length", str(facts["length"]), "--quiet"]
    command += ["--calibration", str(shared / "data" / f"{facts['calibration']}.json")]
    command += ["--set", "evaluation.data=[]", "--set", "evaluation.speed=false", "--set", f"method.group_size={group}"]
    command += ["--set", "on_indivisible=channel", "--set", f"calibration.packed={str(not facts.get('each')).lower()}"]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    process = time.perf_counter() - start
    report = json.loads((out / "report.json").read_text())
    return {"seconds": report["stages"][0]["seconds"]["compress_stage"], "process": process}


def load(folder: Path, base: Path) -> Any:
    """A model in float32: by transformers, or for a GPTQ folder by the decoder below."""
    config = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
    if config.get("quant_method") != "gptq":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    bits = int(config["bits"])
    state = {
        k: v.float() for k, v in tensors.items() if k.rpartition(".")[2] not in ("qweight", "qzeros", "scales", "g_idx")
    }
    for key in [k for k in tensors if k.endswith(".qweight")]:
        name = key.removesuffix(".qweight")
        state[name + ".weight"] = gptq_matrix(tensors, name, bits, config.get("checkpoint_format", "gptq") == "gptq")
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model


def gptq_matrix(tensors: dict[str, Tensor], name: str, bits: int, minus_one: bool) -> Tensor:
    """A GPTQ layer's weight [out, in]: codes packed along the inputs, zeros along the outputs (v1 stores zero - 1)."""
    codes = unpacked(tensors[f"{name}.qweight"].T, bits).T
    zeros = unpacked(tensors[f"{name}.qzeros"], bits) + (1 if minus_one else 0)
    groups, scales = tensors[f"{name}.g_idx"].long(), tensors[f"{name}.scales"].float()
    return ((codes[: len(groups)] - zeros[groups][:, : codes.shape[1]]) * scales[groups]).T.contiguous()


def unpacked(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, words] -> values [rows, words * 32 / bits], value i at bit i * bits of the row."""
    stream = ((words.long() & 0xFFFFFFFF)[..., None] >> torch.arange(32)) & 1
    flat = stream.flatten(1)
    count = flat.shape[1] // bits
    return (flat[:, : count * bits].view(len(flat), count, bits) << torch.arange(bits)).sum(-1)


@torch.no_grad()
def score(model: Any, base: Any, text: Rows) -> Scores:
    """Per-row scores against the original."""
    scores = Scores()
    for batch in text.batches(2048):
        scores.update(model(batch).logits, batch, base(batch).logits)
    return scores


def main() -> None:
    """Print a table for each setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--model", choices=MODELS, default="lab8m")
    parser.add_argument("--settings", nargs="+", default=["4:128", "3:128", "2:64"])
    for peer in PEERS:
        parser.add_argument(f"--{peer.replace('-', '')}", dest=peer)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shared, facts = args.shared.resolve(), MODELS[args.model]
    source = shared / "models" / args.model
    tokenizer, base = (
        AutoTokenizer.from_pretrained(source),
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval(),
    )
    texts = {
        name: tokenize(
            documents(str(shared / "data" / f"{name}.json"), seed=0, split="test"),
            tokenizer,
            rows=EVALUATION_ROWS[args.model],
            length=facts["length"],
            packed=not facts.get("each"),
            data=name,
        )
        for name in facts["texts"]
    }
    for setting in args.settings:
        bits, group = map(int, setting.split(":"))
        print(f"\n{args.model} W{bits} g{group}")
        found: dict[str, list[Scores]] = {}
        with tempfile.TemporaryDirectory() as folder:
            for tool in (*PEERS, "llmshrink"):
                out = Path(folder) / tool
                if tool == "llmshrink":
                    times = run_ours(source, out, bits, group, facts, shared)
                elif getattr(args, tool):
                    times = run_peer(
                        getattr(args, tool), shared / "bench" / PEERS[tool], source, out, bits, group, facts
                    )
                else:
                    continue
                model = load(out, source)
                found[tool] = [score(model, base, text) for text in texts.values()]
                size = sum(f.stat().st_size for f in out.glob("*.safetensors"))
                kl = " / ".join(f"{s.kl:.5f}" for s in found[tool])
                ppl = " / ".join(f"{s.perplexity:.2f}" for s in found[tool])
                clock = f"{times['seconds']:6.1f} s  process {times['process']:6.1f} s"
                print(f"  {tool:15} {clock}  {size} bytes  KL {kl}  ppl {ppl}", flush=True)
        for number, text in enumerate(texts):
            peers = {tool: s[number] for tool, s in found.items() if tool != "llmshrink"}
            if peers:
                best = min(peers, key=lambda tool: peers[tool].kl or 0.0)
                ratio, low, high = bootstrap_ratio(found["llmshrink"][number].kl_rows, peers[best].kl_rows)
                print(f"  {text}: KL {ratio:.3f} of {best}'s, 95 % interval {low:.3f} to {high:.3f}", flush=True)


if __name__ == "__main__":
    main()
