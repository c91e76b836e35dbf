"""llama.cpp itself reads the GGUF files of every family: the same next tokens, and the same tokens of a text.

It computes in float32 here, but rounds activations that meet float16 or bfloat16 matrices to these, and has a table of
GELU in float16. So bfloat16 may change the most probable token where two are near.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import CHANGES, FAMILIES, rounded, write
from helpers import recipe
from tiny import VOCABULARY, build_model, config
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from vocabularies import BYTES, NASTY, SENTENCEPIECE, save

from llmshrink import run
from llmshrink.checks.written import streamed_output
from llmshrink.demo import MODEL_DIR
from llmshrink.gguf.checkpoint import SINGLE
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.progress import Silent
from llmshrink.report.schema import Check

pytestmark = pytest.mark.readers

PYTHON = "LLMSHRINK_LLAMACPP_PYTHON"
SCRIPT = Path(__file__).parent / "read_llamacpp.py"
LENGTH, NEW = 40, 12  # beyond the windows of 16 tokens, and the contexts of 32 that positions are scaled from
PROMPTS = torch.randint(1, VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(5))
SPREAD = 0.5  # of the logits: without one any comparison passes
KL_LIMIT = {"F32": 1e-6, "F16": 2e-5, "BF16": 1e-3}  # nats per token; measured: 1.7e-7, 3.7e-6, 1.9e-4 at most

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FACTORS = {"long_factor": [1.5 + n for n in range(8)], "short_factor": [1.0 + n / 4 for n in range(8)]}
LONG = {"rope_type": "longrope", "factor": 4.0, **FACTORS}
ORIGINAL = {"original_max_position_embeddings": 32, "rope_theta": 10000.0}
POSITIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    "llama-llama3": ("llama", {"rope_parameters": {**LLAMA3, **ORIGINAL}}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-heads": ("llama", {"head_dim": 32}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}}),
    "gemma3-thetas": (
        "gemma3",
        {
            "num_hidden_layers": 7,
            "layer_types": ["full_attention" if n % 3 == 2 else "sliding_attention" for n in range(7)],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 20000.0},
            },
        },
    ),
    "gemma3-windows": ("gemma3", {"layer_types": ["sliding_attention"] * 2}),
    "phi3-long": ("phi3", {"rope_parameters": {**LONG, **ORIGINAL}, "original_max_position_embeddings": 32}),
    "phi3-short": (
        "phi3",
        {
            "rope_parameters": {**LONG, **ORIGINAL, "original_max_position_embeddings": 256},
            "original_max_position_embeddings": 256,
            "max_position_embeddings": 1024,
        },
    ),
    "phi3-partial": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "gpt2-inner": ("gpt2", {"n_inner": 96}),
}


@dataclass(frozen=True)
class Case:
    """A model written as one type."""

    name: str
    type: str


CASES = [Case(name, "F32") for name in (*FAMILIES, *POSITIONS)] + [
    Case(name, type) for name in FAMILIES for type in ("F16", "BF16")
]
MIXES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0")
QUANTIZED = [*(Case("wide", mix) for mix in MIXES), Case("demo", "Q4_K_M"), Case("demo", "Q8_0")]
WIDE = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.04}
BLOCKS_LIMIT = 2e-3  # nats per token: llama.cpp's kernels round the inputs of these matrices to 8 bits
TOKENIZERS = tuple(f"words-{kind}" for kind in (*BYTES, *SENTENCEPIECE, "demo"))
# Of this kind the notes of a plan say so.
DIFFERENT = {"words-llama-new": [text for text in NASTY if text.startswith((" ", "a<s>"))]}


@dataclass(frozen=True)
class Found:
    """What llama.cpp made of the files."""

    sources: dict[str, Path]
    readings: dict[Case | str, dict[str, Any]]


def source_of(name: str, root: Path) -> Path:
    family, more = POSITIONS.get(name, (name, {}))
    if family == "mistral":  # llama.cpp has no windows for it
        more = {**more, "sliding_window": None}
    build_model(root / name, config(family, **{**CHANGES.get(family, {}), **more}))
    return root / name


def read(work: Path, requests: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    python = os.environ.get(PYTHON)
    if python is None:
        pytest.fail(f"{PYTHON} does not name the Python of llama.cpp's environment; `make test-readers` sets it")
    (work / "requests.json").write_text(json.dumps(requests))
    done = subprocess.run([python, SCRIPT, work], cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    return (json.loads((work / f"{number}.json").read_text()) for number in range(len(requests)))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    root = tmp_path_factory.mktemp("llamacpp")
    sources = {name: source_of(name, root) for name in (*FAMILIES, *POSITIONS)}
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    for kind in (*BYTES, *SENTENCEPIECE):
        folder = sources[f"words-{kind}"] = root / f"words-{kind}"
        build_model(folder, config("llama", vocab_size=len(save(kind, folder)) + 3, **small))
        save(kind, folder)
    sources["words-demo"] = MODEL_DIR
    requests = [
        {"file": str(write(sources[case.name], root / f"{case.name}-{case.type}", case.type)), "texts": []}
        | {"prompts": PROMPTS.tolist(), "new": NEW}
        for case in CASES
    ]
    requests += [
        {"file": str(write(sources[kind], root / f"{kind}-written")), "texts": NASTY, "prompts": [], "new": 0}
        for kind in TOKENIZERS
    ]
    readings = read(root, requests)
    return Found(sources, dict(zip((*CASES, *TOKENIZERS), readings, strict=True)))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Folders as a run makes them."""
    root = tmp_path_factory.mktemp("quantized")
    build_model(root / "wide", config("llama", **WIDE), torch.bfloat16)
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmshrink.job.check_reader", lambda *_: Check(name="reader", passed=True, detail="left out"))
        for case in QUANTIZED:
            source = MODEL_DIR if case.name == "demo" else root / "wide"
            stage = {"format": {"name": "gguf", "type": case.type}}
            out = folders[f"{case.name}-{case.type}"] = root / f"{case.name}-{case.type}"
            run.execute(recipe(source, out, root, {"name": "rtn"}, stage=stage), progress=Silent())
    requests = [
        {"file": str(folder / SINGLE), "texts": [], "prompts": PROMPTS.tolist(), "new": NEW}
        for folder in folders.values()
    ]
    return Found(folders, dict(zip(QUANTIZED, read(root, requests), strict=True)))


@pytest.mark.parametrize("case", QUANTIZED, ids=lambda case: f"{case.name}-{case.type}")
def test_block_types_mean_the_same(quantized: Found, case: Case) -> None:
    written = StreamedModel(open_source(str(quantized.sources[f"{case.name}-{case.type}"])), torch.device("cpu"))
    kl, spread, _ = compare(quantized.readings[case], lambda row: streamed_output(written, row))
    print(f"{case.name} {case.type}: KL {kl:.1e}, spread {spread:.2f}")
    assert spread > SPREAD
    assert kl <= BLOCKS_LIMIT


@torch.no_grad()
def compare(reading: dict[str, Any], logits_of: Callable[[Tensor], Tensor]) -> tuple[float, float, bool]:
    """The largest mean KL(ours || llama.cpp) of a row, the spread of our logits, whether all tokens are the same."""
    assert reading["error"] is None, reading["error"]
    kls, spreads, same = [], [], []
    for prompt, new, steps in zip(PROMPTS, reading["generated"], reading["logprobs"], strict=True):
        row = torch.cat([prompt, torch.tensor(new)])[None]
        theirs = torch.tensor(steps, dtype=torch.float64)  # one step less where a text came to its end
        logits = logits_of(row)[0, LENGTH - 1 : LENGTH - 1 + len(theirs)].double()
        same.append(logits.argmax(-1).tolist() == new[: len(theirs)])
        ours = logits.log_softmax(-1)
        kls.append((ours.exp() * (ours - theirs)).sum(-1).mean().item())
        spreads.append(logits.std().item())
    return max(kls), min(spreads), all(same)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.type}")
def test_the_same_tokens_follow(found: Found, case: Case) -> None:
    model = rounded(found.sources[case.name], case.type)
    kl, spread, same = compare(found.readings[case], lambda row: model(row).logits)
    print(f"{case.name} {case.type}: KL {kl:.1e}, {'the same' if same else 'other'} tokens")
    assert spread > SPREAD
    assert kl <= KL_LIMIT[case.type]
    assert same or case.type == "BF16", "the most probable token is another one"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_text_has_the_same_tokens(found: Found, kind: str) -> None:
    assert found.readings[kind]["error"] is None, found.readings[kind]["error"]
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(found.sources[kind])
    theirs = dict(zip(NASTY, found.readings[kind]["tokens"], strict=True))
    differing = [text for text in NASTY if theirs[text] != tokenizer(text)["input_ids"]]
    assert sorted(differing) == sorted(DIFFERENT.get(kind, []))
