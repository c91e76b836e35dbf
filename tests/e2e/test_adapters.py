"""Several adapters of one model: listed, switched, summed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import load, logits
from peft import PeftModel

from llmshrink.cli import main
from llmshrink.evaluate.reader import read


@pytest.fixture(scope="module", autouse=True)
def _in_this_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmshrink.checks.adapter.measure", lambda requests: [read(request) for request in requests])
        yield


@pytest.fixture(scope="module")
def learned(smallest: Path, text_file: Path, other_text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One adapter for each text."""
    root, found = tmp_path_factory.mktemp("learned"), []
    for name, text in (("one", text_file), ("other", other_text)):
        steps = ["--max-steps", "8", "--rate", "0.03", "--rank", "4", "--set", "train.length=16", "--quiet"]
        none = ["--set", "evaluation.data=[]", "--set", "evaluation.speed=false"]
        assert main(["lora", str(smallest), "--data", str(text), *steps, *none, "-o", str(root / name)]) == 0
        found.append(root / name)
    return found


def test_adapters_are_listed_compared_and_merged(
    smallest: Path, text_file: Path, learned: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = map(str, learned)
    capsys.readouterr()
    assert main(["adapters", "ls", one, other, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [line["kind"] for line in told] == ["lora", "lora"] and told[0]["rank"] == 4 and told[0]["tokens"] == 480
    measure = ["--evaluation", str(text_file), "--rows", "2", "--length", "16", "--json", "--quiet"]
    assert main(["adapters", "compare", str(smallest), one, other, *measure]) == 0
    (line,) = json.loads(capsys.readouterr().out)
    assert line[one] < line[""] and line[one] < line[other]
    out, whole = tmp_path / "sum", tmp_path / "whole"
    assert main(["adapters", "merge", str(smallest), f"{one}=0.7", f"{other}=-0.2", "-o", str(out)]) == 0
    assert main(["adapters", "merge", str(smallest), f"{one}=0.7", f"{other}=-0.2", "--into", "-o", str(whole)]) == 0
    right = load(smallest)[0]
    with torch.no_grad():
        for folder, weight in zip(learned, (0.7, -0.2), strict=True):
            adapted = PeftModel.from_pretrained(load(smallest)[0], str(folder))
            for name, module in adapted.named_modules():
                if hasattr(module, "get_delta_weight"):
                    place = right.get_submodule(name.removeprefix("base_model.model."))
                    place.weight += weight * module.get_delta_weight("default")
    found = PeftModel.from_pretrained(load(smallest)[0], str(out)).eval()
    assert (logits(found) - logits(right)).abs().max() < 1e-4
    assert (logits(load(whole)[0]) - logits(right)).abs().max() < 1e-4
    assert main(["adapters", "merge", str(smallest), one, other, "--how", "svd", "-o", str(tmp_path / "svd")]) == 0


def test_what_cannot_be_merged_is_told(
    smallest: Path, learned: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for given, code, told in (
        ([str(smallest)], 8, "holds no adapter"),
        ([f"{learned[0]}=much"], 2, "write it as DIR=WEIGHT"),
        ([str(learned[0]), "--how", "sum"], 3, "There is no way 'sum'"),
    ):
        assert main(["adapters", "merge", str(smallest), *given, "-o", str(tmp_path / "out")]) == code
        assert told in capsys.readouterr().err
