"""Folders in the formats gptq and awq, read by plain transformers with optimum and gptqmodel on a CPU.

gptqmodel decodes in float16: scale * (code - zero). The difference of two codes is an integer below 256, exact there,
and the product is rounded to nearest: each of its weights is ours (float32, exact) rounded to float16, bit for bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_reader import Reading, kl_and_agreement, read_folders
from helpers import decoded_model, recipe
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, VOCABULARY, WIDE, build_model, config
from torch import Tensor

from llmshrink import run
from llmshrink.formats import runtimes
from llmshrink.formats.runtimes import Entry, entry, usual
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.model.task import task_of
from llmshrink.progress import Silent

pytestmark = pytest.mark.readers

FORMATS = ("gptq", "awq")
TOKENS = torch.randint(VOCABULARY, (32, 64), generator=torch.Generator().manual_seed(11))
KL_LIMIT = 2.5e-5  # nats per token: 1.3e-5 at most with float16 activations, 4.7e-5 at least with one code flipped
AGREEMENT = 0.99
SPREAD = 0.5  # of the logits: without one any comparison passes
WIDE_LLAMA = "llama-wide"  # its groups of 128 are not one scale per channel


@dataclass(frozen=True)
class Case:
    """A folder to be written and read."""

    family: str
    format: str
    bits: int = 4
    group_size: int = 32
    symmetric: bool = True
    ignore: str | None = None

    @property
    def name(self) -> str:
        kind = "sym" if self.symmetric else "asym"
        return f"{self.family}-{self.format}{self.bits}-g{self.group_size}-{kind}{'-ignore' if self.ignore else ''}"


def reads(family: str, fmt: str) -> bool:
    """Whether the table says that transformers reads this family from this format."""
    model_type = config(family).model_type
    found = next(f for f in runtimes.FAMILIES if model_type in f.model_types)
    return entry(usual(found, fmt), "transformers").support != "no"


CAUSAL = [family for family in FAMILIES if task_of(config(family)).causal]
PAIRS = [(family, fmt) for family in CAUSAL for fmt in FORMATS]
OF_FAMILIES = [Case(family, fmt, symmetric=fmt == "gptq") for family, fmt in PAIRS if reads(family, fmt)]
OF_SCHEMES = [
    Case(WIDE_LLAMA, fmt, bits, size, symmetric)
    for fmt, widths in (("gptq", (2, 3, 4, 8)), ("awq", (4,)))
    for bits in widths
    for size in (32, 64, 128, -1)
    for symmetric in (True, False)
]
PARTLY = [Case("llama", fmt, ignore=".*down_proj") for fmt in FORMATS]
NOT_ON_A_CPU = [case for case in OF_SCHEMES if (case.bits, case.group_size) == (4, -1)]
GOOD = [case for case in (*OF_FAMILIES, *OF_SCHEMES, *PARTLY) if case not in NOT_ON_A_CPU]
CONTROLS = [case for case in OF_SCHEMES if case.group_size == 64]  # every format, number of bits, and symmetry
# One more is refused by the format itself: one block has experts, the other a dense MLP.
REFUSED = [Case(*pair) for pair in PAIRS if not reads(*pair) and pair != ("qwen3-moe", "gptq")]


@dataclass(frozen=True)
class Written:
    """A folder that llmshrink wrote, and its source."""

    source: Path
    folder: Path

    def weights(self) -> dict[str, Tensor]:
        """Under the name of each module that we say is compressed: the matrix [out, in] as llmshrink decodes it."""
        model = StreamedModel(open_source(str(self.folder)), torch.device("cpu"))
        matrices = [matrix for block in model.anatomy.blocks for matrix in block.matrices]
        return {m.module: model.weights.get(m.key) for m in matrices if m.key in model.weights.compressed}

    def logits(self) -> Tensor:
        with torch.no_grad():
            return decoded_model(self.folder, self.source)(TOKENS).logits


@pytest.fixture(scope="module")
def write(
    models_folder: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Case], Written]:
    """A function case -> its folder, whatever the table says about it."""
    root = tmp_path_factory.mktemp("written")
    wide = root / WIDE_LLAMA
    build_model(wide, config("llama", hidden_size=256, intermediate_size=512, initializer_range=WIDE / 2))

    def folder(case: Case) -> Written:
        source = wide if case.family == WIDE_LLAMA else models_folder(case.family)
        method = {"bits": case.bits, "group_size": case.group_size, "symmetric": case.symmetric}
        stage: dict[str, Any] = {"format": {"name": case.format}, "ignore": [case.ignore] if case.ignore else []}
        out = root / case.name
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(runtimes.TABLE, (case.format, "transformers"), (Entry("native", "", ""),))
            run.execute(recipe(source, out, text_file, {"name": "rtn", **method}, stage=stage), progress=Silent())
        return Written(source, out)

    return folder


@dataclass(frozen=True)
class Found:
    """What came of every case."""

    written: dict[Case, Written]
    readings: dict[Case, Reading]
    flipped: dict[Case, Reading]  # of CONTROLS, with one code changed


@pytest.fixture(scope="module")
def found(write: Callable[[Case], Written], tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Every folder written, and read by one process."""
    written = {case: write(case) for case in (*GOOD, *NOT_ON_A_CPU, *REFUSED)}
    folders = [w.folder for w in written.values()] + [with_a_flipped_code(written[case].folder) for case in CONTROLS]
    readings = read_folders(tmp_path_factory.mktemp("readings"), folders, TOKENS, "float16")
    first = len(written)
    return Found(
        written,
        dict(zip(written, readings[:first], strict=True)),
        dict(zip(CONTROLS, readings[first:], strict=True)),
    )


def with_a_flipped_code(folder: Path) -> Path:
    """A copy in which the highest bit of the first code of the first block's first matrix is another."""
    copy = folder.with_name(folder.name + "-flipped")
    shutil.copytree(folder, copy)
    bits = json.loads((copy / "config.json").read_bytes())["quantization_config"]["bits"]
    path = copy / "model-00001-of-00003.safetensors"
    tensors = load_file(path)
    codes = tensors[min(name for name in tensors if name.endswith("qweight"))]
    codes.view(-1)[0] ^= 1 << bits - 1
    save_file(tensors, path, metadata={"format": "pt"})
    return copy


def differing(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> int:
    """How many weights are not ours rounded to float16; zeros of both signs are equal."""
    return sum(int((theirs[name] != weight.half()).sum()) for name, weight in ours.items())


@pytest.mark.parametrize("case", GOOD, ids=lambda case: case.name)
def test_a_folder_means_there_what_it_means_here(found: Found, case: Case) -> None:
    written, reading = found.written[case], found.readings[case]
    assert reading.error is None and not reading.misplaced
    ours = written.weights()
    assert set(reading.weights) == set(ours), "what is compressed is quantized there, and nothing else"
    assert all(weight.dtype == torch.float16 for weight in reading.weights.values())
    assert differing(ours, reading.weights) == 0
    logits = written.logits()
    assert logits.std() > SPREAD and reading.logits is not None
    kl, agreement = kl_and_agreement(logits, reading.logits)
    assert kl <= KL_LIMIT and agreement >= AGREEMENT


@pytest.mark.parametrize("case", CONTROLS, ids=lambda case: case.name)
def test_one_flipped_code_shows(found: Found, case: Case) -> None:
    written, flipped = found.written[case], found.flipped[case]
    assert flipped.error is None and flipped.logits is not None
    assert differing(written.weights(), flipped.weights) == 1
    assert kl_and_agreement(written.logits(), flipped.logits)[0] > KL_LIMIT


@pytest.mark.parametrize("case", NOT_ON_A_CPU, ids=lambda case: case.name)
def test_four_bits_per_channel_are_decoded_but_not_run_on_a_cpu(found: Found, case: Case) -> None:
    written, reading = found.written[case], found.readings[case]
    assert not reading.misplaced and differing(written.weights(), reading.weights) == 0
    assert "qGroupSize to be 32, 64, 128 or 256" in (reading.error or "")


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_what_the_table_refuses_is_not_read(found: Found, case: Case) -> None:
    reading = found.readings[case]
    assert reading.error is not None or reading.misplaced
