"""Peak anonymous memory of the compress step does not grow with depth: 4 blocks against 24.

    python -m bench.memory [--folder DIR] [--blocks 4 24] [--memory 800MiB 640MiB]

With --memory the first model is quantized within each of these budgets instead, and measured on a text beside the
original: does the whole process keep to it, and what does that cost in time?

Makes Llamas of random weights (24 blocks: 1.3 GB in bf16), quantizes each with the default recipe in a process of its
own and prints peak, plan, and the ratio. Needs about 4 GB of disk and, on two cores, some minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from llmshrink.demo import MODEL_DIR
from llmshrink.io import safetensors
from llmshrink.io.files import copy_file

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 1536, 4096, 12, 4, 32000


def make_model(folder: Path, blocks: int) -> None:
    """A Llama with random weights, one shard for each block, and the embedded model's tokenizer."""
    folder.mkdir(parents=True)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=blocks,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}

    def save(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {
            key: torch.ones(shape).bfloat16()
            if len(shape) == 1
            else torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
            for key, shape in shapes.items()
        }
        safetensors.write(folder / name, tensors)
        weight_map.update(dict.fromkeys(tensors, name))

    wide, narrow = (HIDDEN, HIDDEN), (HIDDEN * KV_HEADS // HEADS, HIDDEN)
    for i in range(blocks):
        names = {
            "self_attn.q_proj": wide,
            "self_attn.k_proj": narrow,
            "self_attn.v_proj": narrow,
            "self_attn.o_proj": wide,
        }
        names |= {"mlp.gate_proj": (INTERMEDIATE, HIDDEN), "mlp.up_proj": (INTERMEDIATE, HIDDEN)}
        names |= {
            "mlp.down_proj": (HIDDEN, INTERMEDIATE),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }
        save(f"block-{i:02d}.safetensors", {f"model.layers.{i}.{n}.weight": s for n, s in names.items()})
    save(
        "outside.safetensors",
        {
            "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
            "model.norm.weight": (HIDDEN,),
            "lm_head.weight": (VOCABULARY, HIDDEN),
        },
    )
    (folder / safetensors.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copy_file(MODEL_DIR / name, folder / name)


CHILD = """
import json, sys
from llmshrink import run
from llmshrink.memory import PeakMonitor
from llmshrink.progress import Silent
from llmshrink.recipe.load import validate
with PeakMonitor(base=0) as process:
    report = run.execute(validate(json.loads(sys.argv[1])), progress=Silent())
stage = report.stages[0]
print(json.dumps({"peak": stage.memory.measured_bytes, "planned": stage.memory.planned_bytes, "seconds": stage.seconds,
                  "bytes": stage.bytes_before, "process": process.peak_bytes, "wall": report.seconds,
                  "events": [event.message for event in report.events]}))
"""


def measure(model: Path, out: Path, rows: int, length: int, **more: Any) -> dict[str, Any]:
    """Quantize in a fresh process; peak above the level after the imports."""
    recipe: dict[str, Any] = {
        "version": 1,
        "model": {"id": str(model)},
        "stages": [{"task": "quantize", "method": {"name": "gptq", "bits": 4}}],
        "calibration": {"data": "generator", "samples": rows, "length": length},
        "evaluation": {"data": [], "speed": False},
        "output": str(out),
        **more,
    }
    made = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(recipe)], check=True, stdout=subprocess.PIPE, text=True
    )
    result: dict[str, Any] = json.loads(made.stdout.splitlines()[-1])
    return result


def show_budgets(model: Path, root: Path, rows: int, length: int, budgets: list[str]) -> None:
    """One line for each budget: what the whole process held, in how many seconds."""
    evaluation = {"data": ["generator"], "rows": rows, "length": length, "speed": False}
    for budget in [None, *budgets]:
        with tempfile.TemporaryDirectory(dir=root) as out:
            more = {"evaluation": evaluation, "run": {"memory": budget} if budget else {}}
            found = measure(model, Path(out) / "out", rows, length, **more)
        print(
            f"budget {budget}: process {found['process'] / 2**20:.0f} MiB, compress step "
            f"{found['peak'] / 2**20:.0f} above the imports, planned {found['planned'] / 2**20:.0f}; "
            f"{found['wall']:.0f} s; {'; '.join(found['events'])}",
            flush=True,
        )


def main() -> None:
    """Print one line for each depth, then the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 24])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--memory", nargs="+")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = args.folder or Path(name)
        results = {}
        for blocks in args.blocks:
            model = root / f"model-{blocks}"
            if not model.exists():
                make_model(model, blocks)
            if args.memory:
                show_budgets(model, root, args.rows, args.length, args.memory)
                return
            with tempfile.TemporaryDirectory(dir=root) as out:
                results[blocks] = found = measure(model, Path(out) / "out", args.rows, args.length)
            print(
                f"{blocks} blocks, {found['bytes'] / 2**20:.0f} MiB: peak {found['peak'] / 2**20:.0f} MiB "
                f"({found['peak'] / found['bytes']:.1%} of the model), planned {found['planned'] / 2**20:.0f} MiB "
                f"({found['planned'] / found['peak'] - 1:+.0%}), seconds {found['seconds']}",
                flush=True,
            )
        first, last = results[args.blocks[0]], results[args.blocks[-1]]
        print(f"peak of the deepest / peak of the shallowest: {last['peak'] / first['peak']:.2f}")


if __name__ == "__main__":
    main()
