"""AutoRound's AutoScheme on the shared calibration text: mixed precision at an average number of bits.

    cd ../shared/bench && PYTHON THIS_FILE MODEL OUT --bits 3 --rows 128 --length 256 --calibration calibration

PYTHON is that of an environment with auto-round. `--bits` is the average, scales and zeros counted (a fraction too);
the options are 3, 4 and 8 bits in groups of 128, and 2 bits in groups of 32 and 64, as llmshrink's own candidates.
AutoScheme takes no rows of tokens and drops texts shorter than a row, so it gets texts that begin with the very rows.
It prints its seconds and what each layer got; `bench.mixed` runs it and scores what it wrote.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path.cwd()))  # the shared scripts: `common` below is one, hence imports after code

import torch  # noqa: E402
from auto_round import AutoRound, AutoScheme  # noqa: E402
from auto_round.schemes import QuantizationScheme  # noqa: E402
from common import Stopwatch, documents, pack  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

OPTIONS = ((2, 32), (2, 64), (3, 128), (4, 128), (8, 128))


def main() -> None:
    """Quantize and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--bits", type=float, required=True)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--calibration", default="calibration")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = calibration(tokenizer, documents(args.calibration), args.length, args.rows)
    options = [QuantizationScheme(bits=b, group_size=g, sym=True, data_type="int") for b, g in OPTIONS]
    with Stopwatch() as clock:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump([{"text": text} for text in texts], file)
            file.flush()
            scheme = AutoScheme(
                avg_bits=args.bits, options=options, nsamples=len(texts), seqlen=args.length, dataset=file.name
            )
            tool = AutoRound(
                model,
                tokenizer,
                scheme=scheme,
                iters=args.iterations,
                nsamples=len(texts),
                seqlen=args.length,
                dataset=file.name,
                device_map="cpu",
                amp=False,
            )
            tool.quantize_and_save(args.out, format="auto_round")
    got = Counter(str((v.get("bits"), v.get("group_size"))) for v in tool.layer_config.values())
    print(json.dumps({"seconds": clock.seconds, "layers": got}))


def calibration(tokenizer: Any, texts: list[str], length: int, count: int) -> list[str]:
    """A text for each of the shared rows, whose first tokens are that row: more follow, so that its end stays whole."""
    rows = pack(tokenizer, texts, length, count)
    stream = pack(tokenizer, texts, 1, (count + 1) * length).flatten()
    longer = [tokenizer.decode(stream[i * length : (i + 1) * length + length // 4]) for i in range(len(rows))]
    for row, text in zip(rows, longer, strict=True):
        assert tokenizer(text, truncation=True, max_length=length)["input_ids"] == row.tolist(), text
    return longer


if __name__ == "__main__":
    main()
