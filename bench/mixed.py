"""Mixed precision beside AutoRound's AutoScheme: same model, same rows, same candidates, at no more bytes.

    python -m bench.mixed --shared ../shared --autoround PYTHON --folder OUT [--bits 2.5 3 4] [--presets balanced best]

PYTHON is that of an environment with auto-round. Outputs stay in OUT, and what is there is not made again. AutoScheme
works in float32 and leaves embedding, head and norms in it; ours leaves them in the original's bfloat16. So ours may
have the bytes of AutoScheme's files less half of what is float32 there (the values are the original's all the same):
what is left for the linears is then equal. With `--as-written` it may have the bytes of the files as they are.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from bench.peers import MODELS, OWN, evaluation, load, run_ours, score
from llmshrink.evaluate.metrics import Scores, bootstrap_ratio

MODEL = "lab8m"


def run_autoscheme(python: str, shared: Path, out: Path, bits: float) -> None:
    """AutoScheme, then AutoRound, with the shared rows."""
    facts = MODELS[MODEL]
    command = [python, str(OWN / "peer_autoscheme.py"), f"../models/{MODEL}", str(out), "--bits", str(bits)]
    command += ["--rows", str(facts["rows"]), "--length", str(facts["length"]), "--calibration", facts["calibration"]]
    subprocess.run(command, cwd=shared / "bench", check=True, capture_output=True)


def stored(folder: Path) -> tuple[int, dict[str, Tensor]]:
    """Bytes of all safetensors files in a folder, and what is in them."""
    tensors: dict[str, Tensor] = {}
    files = sorted(folder.rglob("*.safetensors"))
    for file in files:
        tensors |= load_file(file)
    return sum(file.stat().st_size for file in files), tensors


def allowed(folder: Path, as_written: bool) -> int:
    """The bytes that ours may have."""
    size, tensors = stored(folder)
    return size if as_written else size - sum(t.nbytes for t in tensors.values() if t.dtype == torch.float32) // 2


def bits_per_weight(folder: Path, source: dict[str, Tensor]) -> float:
    """Bits of all that stands for the matrices that were compressed, over their numbers."""
    _, tensors = stored(folder)
    instead = 8 * sum(t.nbytes for name, t in tensors.items() if name not in source)
    return instead / sum(t.numel() for name, t in source.items() if name not in tensors)


def main() -> None:
    """Print a line for each output, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--autoround", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--bits", type=float, nargs="+", default=[2.5, 3.0, 4.0])
    parser.add_argument("--presets", nargs="+", default=["balanced", "best"])
    parser.add_argument("--as-written", action="store_true")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shared, folder = args.shared.resolve(), args.folder.resolve()
    model = shared / "models" / MODEL
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    texts = evaluation(MODEL, shared, AutoTokenizer.from_pretrained(model))
    _, source = stored(model)

    def measured(tool: str, out: Path) -> list[Scores]:
        loaded = load(out, model)
        scores = [score(loaded, base, text) for text in texts.values()]
        kl = " / ".join(f"{s.kl:.5f}" for s in scores)
        per_weight = bits_per_weight(out, source)
        print(f"  {tool:20} {stored(out)[0]} bytes  {per_weight:.4f} bits a weight  KL {kl}", flush=True)
        return scores

    for bits in args.bits:
        theirs = folder / f"autoscheme-{bits:g}"
        if not any(theirs.rglob("config.json")):
            run_autoscheme(args.autoround, shared, theirs, bits)
        size = allowed(theirs, args.as_written)
        print(f"\nAutoScheme at {bits:g} bits; ours in at most {size} bytes", flush=True)
        peer = measured("AutoScheme", theirs)
        for preset in args.presets:
            out = folder / f"{preset}-{size}"
            if not out.exists():
                run_ours(model, out, ["quantize", "--target-size", str(size)], preset, MODELS[MODEL], shared)
            for name, mine, other in zip(texts, measured(f"llmshrink {preset}", out), peer, strict=True):
                ratio, low, high = bootstrap_ratio(mine.kl_rows, other.kl_rows)
                print(f"    {name} {ratio:.3f} ({low:.3f} to {high:.3f})", flush=True)


if __name__ == "__main__":
    main()
