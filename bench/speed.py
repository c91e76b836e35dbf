"""What a smaller model gains in speed: layers or neurons less, tokens per second beside the parameters that are gone.

    python -m bench.speed [--threads 2] [--repeat 5]

A random Llama of 340 M parameters in bfloat16, most of them in its blocks, is cut by the command without any text
(`--set cut.criterion=magnitude`, no repair); then transformers times the whole model and what is left in turn:
decoding one token after another (bound by memory) and reading a prompt (bound by computing), medians of all turns.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

CUTS = {
    "layers 12 of 16": ["--layers", "0,1,2,3,4,5,6,7,8,9,10,11"],
    "neurons 2304 of 4096": ["--neurons", "2304", "--set", "cut.criterion=magnitude"],
    "both": ["--layers", "0,1,2,3,4,5,6,7,8,9,10,11", "--neurons", "3072", "--set", "cut.criterion=magnitude"],
}
DECODED, PROMPT = 24, 256  # tokens


def made(folder: Path) -> Path:
    """The random model, written."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=2048,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@torch.no_grad()
def timed(model: Any) -> tuple[float, float]:
    """Tokens per second of decoding, and of reading a prompt."""
    prompt = torch.arange(PROMPT)[None]
    start = time.perf_counter()
    model(prompt)
    read = PROMPT / (time.perf_counter() - start)
    start = time.perf_counter()
    model.generate(prompt[:, :8], min_new_tokens=DECODED, max_new_tokens=DECODED, do_sample=False)
    return DECODED / (time.perf_counter() - start), read


def main() -> None:
    """Print a line for each cut."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        source = made(Path(folder) / "whole")
        whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
        for name, options in CUTS.items():
            out = Path(folder) / name.replace(" ", "-")
            command = [sys.executable, "-m", "llmshrink", "prune", str(source), *options, "-o", str(out), "--quiet"]
            command += ["--set", "cut.repair=false", "--set", "evaluation.data=[]", "--set", "evaluation.speed=false"]
            subprocess.run(command, check=True)
            left = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()
            timed(left), timed(whole)
            pairs = [(timed(whole), timed(left)) for _ in range(args.repeat)]
            size = sum(p.numel() for p in left.parameters()) / sum(p.numel() for p in whole.parameters())
            print(f"{name}: {1 - size:.1%} of the parameters less, ideally {1 / size:.3f} times the tokens/s")
            for number, what in enumerate(("decoding", "prompt")):
                gains = [after[number] / before[number] for before, after in pairs]
                gain = statistics.median(gains)
                every = " ".join(f"{one:.2f}" for one in gains)
                share = (gain - 1) / (1 - size)
                print(
                    f"  {what:9} {gain:.3f} times ({every}): {share:.2f} % more tokens/s for each % of parameters less"
                )


if __name__ == "__main__":
    main()
