"""What gptqmodel computes from folders in the formats gptq and awq, beside our own decoder.

    make .venv-readers/.installed
    python -m bench.readers --model MODEL --calibration TEXT --evaluation TEXT [--python .venv-readers/bin/python]

Each folder is written as a user would write it, read by plain transformers with optimum and gptqmodel in float16, and
compared on rows of the evaluation text with the same folder decoded by llmshrink in float32, and with the model itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from llmshrink.calibration.rows import tokenize
from llmshrink.calibration.text import documents
from llmshrink.checks.written import streamed_logits
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel

READ = Path(__file__).parent.parent / "tests" / "readers" / "read.py"
SETTINGS: dict[str, list[str]] = {
    "gptq W8 g128": ["--format", "gptq", "--method", "gptq", "--bits", "8"],
    "gptq W4 g128": ["--format", "gptq", "--method", "gptq", "--bits", "4"],
    "gptq W3 g128": ["--format", "gptq", "--method", "gptq", "--bits", "3"],
    "gptq W2 g128": ["--format", "gptq", "--method", "gptq", "--bits", "2"],
    "awq W4 g128, asymmetric": ["--format", "awq", "--method", "gptq", "--asymmetric"],
}
ROWS, LENGTH = 16, 128


def compare(ours: Tensor, theirs: Tensor) -> str:
    """KL(ours || theirs) in nats per token, and the share of positions with the same first choice."""
    p, q = torch.log_softmax(ours.double(), -1), torch.log_softmax(theirs.double(), -1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    return f"{kl:.1e} | {float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()):.2%}"


def logits(folder: Path, tokens: Tensor) -> Tensor:
    """Of a folder as llmshrink decodes it, float32."""
    return streamed_logits(StreamedModel(open_source(str(folder)), torch.device("cpu")), tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--python", default=".venv-readers/bin/python")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        folders = {name: root / str(i) for i, name in enumerate(SETTINGS)}
        for name, out in folders.items():
            command = [sys.executable, "-m", "llmshrink", "quantize", str(given.model), "-o", str(out), "--quiet"]
            command += ["--calibration", str(given.calibration), "--length", "256", *SETTINGS[name]]
            command += ["--set", "evaluation.data=[]", "--set", "evaluation.speed=false"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        tokenizer = AutoTokenizer.from_pretrained(given.model)
        texts = documents(str(given.evaluation), seed=0, split="test")
        found = tokenize(texts, tokenizer, rows=ROWS, length=LENGTH, packed=True, data=given.evaluation.name)
        tokens = torch.stack(found.tokens)
        requests = [{"folder": str(f), "tokens": tokens.tolist(), "dtype": "float16"} for f in folders.values()]
        (root / "requests.json").write_text(json.dumps(requests))
        environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "TORCHDYNAMO_DISABLE": "1"}
        subprocess.run([given.python, READ, root], check=True, cwd=root, env=environment, capture_output=True)
        original = logits(given.model, tokens)
        print("| folder | KL to our decoder | same first choice | KL to the original | same first choice |")
        print("|---|--:|--:|--:|--:|")
        for i, (name, out) in enumerate(folders.items()):
            theirs = load_file(root / f"{i}.safetensors")["logits"]
            print(f"| {name} | {compare(logits(out, tokens), theirs)} | {compare(original, theirs)} |")


if __name__ == "__main__":
    main()
