"""Quality and time beside llm-compressor's and GPTQModel's GPTQ, HQQ and AutoRound: same model, same rows, one run.

    python -m bench.peers --shared ../shared --llmcompressor PYTHON --gptqmodel PYTHON --hqq PYTHON --autoround PYTHON
        [--model lab8m] [--settings 4:128 3:128 2:64 w8a8 fp8] [--presets balanced best] [--repeat 3] [--json FILE]

Each PYTHON is the interpreter of an environment with that tool (they exclude each other, and ours). Every tool runs in
a process of its own with `--shared`'s script; its time is its own stopwatch from load to saved file, ours the compress
stage; whole-process time is given beside it. All outputs are then scored here by one function, row by row: KL to the
original in nats per token, and the ratio to each peer with a paired bootstrap over rows. A setting is bits:group, or a
scheme that rounds inputs too: ours is then the recipe of that name; or a method of pruning with a percentage or a
pattern (wanda:50, sparsegpt:2:4), written dense. Only llm-compressor has these two. `bench.plot` draws what `--json`
keeps.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
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

OWN = Path(__file__).parent
PEERS = {  # a script of `--shared`'s, or one beside this file that works like those
    "llm-compressor": Path("peer_llmcompressor.py"),
    "gptqmodel": Path("peer_gptqmodel.py"),
    "hqq": OWN / "peer_hqq.py",
    "auto-round": Path("peer_autoround.py"),
}
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
SCHEMES = ("w8a8", "fp8")
PRUNING = ("wanda", "sparsegpt")
EVALUATION_ROWS = {"lab8m": 64, "stories260K": 200}


def arguments(setting: str) -> tuple[list[str], list[str]]:
    """What the shared scripts are told of a setting, and what our command is."""
    if setting in SCHEMES:
        return ["--bits", "8", "--method", setting], ["quantize", "-r", setting]
    method, _, what = setting.partition(":")
    if method in PRUNING:
        ours = ["prune", "--method", method, "--format", "dense"]
        if ":" in what:
            return ["--method", method, "--pattern", what], [*ours, "--pattern", what]
        share = str(int(what) / 100)
        return ["--method", method, "--pattern", "0:0", "--sparsity", share], [*ours, "--sparsity", share]
    bits, group = setting.split(":")
    ours = ["quantize", "--bits", bits, "--set", f"method.group_size={group}", "--set", "on_indivisible=channel"]
    return ["--bits", bits, "--group", group], ours


def run_peer(
    python: str, folder: Path, script: Path, model: Path, out: Path, setting: str, facts: dict[str, Any]
) -> dict[str, float]:
    """Run a script in the folder of the shared ones; its own seconds and those of the whole process."""
    command = [python, str(folder / script), str(model), str(out), *arguments(setting)[0]]
    command += ["--rows", str(facts["rows"]), "--length", str(facts["length"]), "--calibration", facts["calibration"]]
    command += ["--evaluation", facts["texts"][0], "--eval-rows", "1"]  # scored below, by one function for all
    start = time.perf_counter()
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script.name} failed:\n{done.stderr[-2000:]}")
    line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
    return {"seconds": json.loads(line)["seconds"], "process": time.perf_counter() - start}


def run_ours(
    model: Path, out: Path, options: list[str], preset: str, facts: dict[str, Any], shared: Path
) -> dict[str, float]:
    """The command as a user types it, without evaluation."""
    command = [sys.executable, "-m", "llmshrink", options[0], str(model), *options[1:], "-o", str(out)]
    command += ["--preset", preset]
    command += ["--samples", str(facts["rows"]), "--length", str(facts["length"]), "--quiet"]
    command += ["--calibration", str(shared / "data" / f"{facts['calibration']}.json")]
    command += ["--set", "evaluation.data=[]", "--set", "evaluation.speed=false"]
    command += ["--set", f"calibration.packed={str(not facts.get('each')).lower()}"]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    process = time.perf_counter() - start
    report = json.loads((out / "report.json").read_text())
    return {"seconds": report["stages"][0]["seconds"]["compress_stage"], "process": process}


def load(folder: Path, base: Path) -> Any:
    """A model in float32: by transformers, or for codes laid out as GPTQ's by the decoder below."""
    folder = next(folder.rglob("config.json")).parent  # AutoRound makes a folder of its own in it
    config = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
    if config.get("quant_method") not in ("gptq", "auto-round"):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    minus_one = config.get("checkpoint_format", "gptq") == "gptq"
    state = {
        k: v.float() for k, v in tensors.items() if k.rpartition(".")[2] not in ("qweight", "qzeros", "scales", "g_idx")
    }
    for key in [k for k in tensors if k.endswith(".qweight")]:
        name = key.removesuffix(".qweight")
        state[name + ".weight"] = gptq_matrix(tensors, name, layer_bits(config, name), minus_one)
    assert not dict(model.named_parameters()).keys() - state.keys()  # nothing is the original's for want of a name
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model


def layer_bits(config: dict[str, Any], name: str) -> int:
    """A layer's bits: AutoRound names each that differs, or gives an expression. Scales tell the size of groups."""
    extra = config.get("extra_config") or {}
    found = next((extra[key] for key in extra if re.search(key, name)), {})
    return int(extra.get(name, found).get("bits", config["bits"]))


def gptq_matrix(tensors: dict[str, Tensor], name: str, bits: int, minus_one: bool) -> Tensor:
    """A GPTQ layer's weight [out, in]: codes packed along the inputs, zeros along the outputs (v1 stores zero - 1)."""
    codes = unpacked(tensors[f"{name}.qweight"].T, bits).T
    zeros = unpacked(tensors[f"{name}.qzeros"], bits) + (1 if minus_one else 0)
    scales = tensors[f"{name}.scales"].float()
    adjacent = torch.arange(len(codes)) * len(scales) // len(codes)  # where nothing says otherwise
    groups = tensors.get(f"{name}.g_idx", adjacent).long()
    return ((codes[: len(groups)] - zeros[groups][:, : codes.shape[1]]) * scales[groups]).T.contiguous()


def unpacked(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, words] -> values [rows, words * 32 / bits], value i at bit i * bits of the row."""
    stream = ((words.long() & 0xFFFFFFFF)[..., None] >> torch.arange(32)) & 1
    flat = stream.flatten(1)
    count = flat.shape[1] // bits
    return (flat[:, : count * bits].view(len(flat), count, bits) << torch.arange(bits)).sum(-1)


def evaluation(model: str, shared: Path, tokenizer: Any) -> dict[str, Rows]:
    """The rows of each text that the bench's model is scored on."""
    facts = MODELS[model]
    return {
        name: tokenize(
            documents(str(shared / "data" / f"{name}.json"), seed=0, split="test"),
            tokenizer,
            rows=EVALUATION_ROWS[model],
            length=facts["length"],
            packed=not facts.get("each"),
            data=name,
        )
        for name in facts["texts"]
    }


@torch.no_grad()
def score(model: Any, base: Any, text: Rows) -> Scores:
    """Per-row scores against the original."""
    scores = Scores()
    for batch in text.batches(2048):
        scores.update(model(batch).logits, batch, base(batch).logits)
    return scores


class Measured:
    """One tool at one setting: its times, repeated, and the scores of what it wrote."""

    def __init__(self) -> None:
        self.times: list[dict[str, float]] = []
        self.scores: list[Scores] = []
        self.bytes = 0

    def facts(self) -> dict[str, Any]:
        """What `bench.plot` draws."""
        return {"times": self.times, "bytes": self.bytes, "kl": [s.kl for s in self.scores]}

    def line(self, tool: str) -> str:
        """A line of the table; times are medians."""
        seconds, process = (statistics.median(t[key] for t in self.times) for key in ("seconds", "process"))
        kl = " / ".join(f"{s.kl:.5f}" for s in self.scores)
        ppl = " / ".join(f"{s.perplexity:.2f}" for s in self.scores)
        every = " ".join(f"{t['seconds']:.1f}" for t in self.times)
        return (
            f"  {tool:15} {seconds:6.1f} s ({every})  process {process:6.1f} s  {self.bytes} bytes  KL {kl}  ppl {ppl}"
        )


def measure(
    args: argparse.Namespace, setting: str, base: Any, texts: dict[str, Rows], source: Path
) -> dict[str, Measured]:
    """All tools in turn, as often as asked, so that the machine's moods meet them all; the first result is scored."""
    facts, shared = MODELS[args.model], args.shared.resolve()
    found: dict[str, Measured] = {}
    for turn in range(args.repeat):
        for tool in (*PEERS, *args.presets):
            alone = setting in SCHEMES or setting.startswith(PRUNING)
            if tool in PEERS and (getattr(args, tool) is None or (alone and tool != "llm-compressor")):
                continue
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / tool
                if tool in PEERS:
                    times = run_peer(getattr(args, tool), shared / "bench", PEERS[tool], source, out, setting, facts)
                else:
                    times = run_ours(source, out, arguments(setting)[1], tool, facts, shared)
                one = found.setdefault(tool, Measured())
                one.times.append(times)
                if turn == 0:
                    model = load(out, source)
                    one.scores = [score(model, base, text) for text in texts.values()]
                    one.bytes = sum(f.stat().st_size for f in out.rglob("*.safetensors"))
    return found


def compare(found: dict[str, Measured], texts: dict[str, Rows]) -> None:
    """Print the table of one setting, and what this tool wrote beside each of the others'."""
    for tool, one in found.items():
        print(one.line(tool if tool in PEERS else f"llmshrink {tool}"))
    peers = {tool: one for tool, one in found.items() if tool in PEERS}
    for preset, ours in ((tool, one) for tool, one in found.items() if tool not in PEERS):
        for tool, one in peers.items():
            ratios = [mine["seconds"] / theirs["seconds"] for mine, theirs in zip(ours.times, one.times, strict=True)]
            every = " ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"  {preset}: time {statistics.median(ratios):.2f} of {tool}'s ({every}); KL", end="")
            for number, text in enumerate(texts):
                rows = ours.scores[number].kl_rows, one.scores[number].kl_rows
                ratio, low, high = bootstrap_ratio(*rows)
                print(f" {text} {ratio:.3f} ({low:.3f} to {high:.3f})", end="")
            print(flush=True)


def main() -> None:
    """Print a table for each setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--model", choices=MODELS, default="lab8m")
    parser.add_argument("--settings", nargs="+", default=["4:128", "3:128", "2:64"])
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--presets", nargs="+", default=["balanced"])
    parser.add_argument("--json", type=Path)
    for peer in PEERS:
        parser.add_argument(f"--{peer.replace('-', '')}", dest=peer)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = args.shared.resolve() / "models" / args.model
    tokenizer = AutoTokenizer.from_pretrained(source)
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    texts = evaluation(args.model, args.shared.resolve(), tokenizer)
    kept: dict[str, Any] = {}
    for setting in args.settings:
        print(f"\n{args.model} {setting}", flush=True)
        found = measure(args, setting, base, texts, source)
        compare(found, texts)
        kept[setting] = {tool: one.facts() for tool, one in found.items()}
        if args.json is not None:
            args.json.write_text(json.dumps({"model": args.model, "texts": list(texts), "settings": kept}))


if __name__ == "__main__":
    main()
