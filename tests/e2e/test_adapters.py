"""Several adapters of one model: listed, switched, summed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import load, logits
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

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
    assert told[0]["task"] == "CAUSAL_LM" and told[0]["own"] is None
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


def other(model: Path, folder: Path, change: Callable[[Tensor], Tensor]) -> Path:
    """A copy of a model with other matrices."""
    shutil.copytree(model, folder)
    for file in folder.glob("*.safetensors"):
        found = {name: change(weight) if weight.ndim == 2 else weight for name, weight in load_file(file).items()}
        save_file(found, file, {"format": "pt"})
    return folder


def test_an_adapter_of_another_model_is_refused(
    smallest: Path, text_file: Path, learned: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights tell where they are known, else its name."""
    moved, changed = (other(smallest, tmp_path / name, change) for name, change in (("a", Tensor.clone), ("b", double)))
    plain = tmp_path / "plain"
    shutil.copytree(learned[0], plain)
    (plain / "report.json").unlink()
    named = other(smallest, tmp_path / "elsewhere" / smallest.name, double)
    measure = ["--evaluation", str(text_file), "--rows", "2", "--length", "16", "--quiet"]
    for base, adapter, right in (
        (moved, learned[0], True),
        (changed, learned[0], False),
        (named, learned[0], False),
        (moved, plain, False),
        (named, plain, True),
    ):
        assert main(["adapters", "compare", str(base), str(adapter), *measure]) == (0 if right else 8), (base, adapter)
        said = capsys.readouterr().err
        assert right or f"{adapter} is for another model, {smallest.name}, and not for {base}" in said
    assert main(["adapters", "merge", str(changed), str(learned[0]), "--into", "-o", str(tmp_path / "out")]) == 8
    assert not (tmp_path / "out").exists()


def double(weight: Tensor) -> Tensor:
    return 2 * weight


def halve(weight: Tensor) -> Tensor:
    return weight * (torch.rand(weight.shape, generator=torch.Generator().manual_seed(4)) < 0.5)


def test_zeros_that_stay_are_told(
    smallest: Path, learned: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a pruned model: then what is written is not the sum."""
    pruned, plain, out = tmp_path / smallest.name, tmp_path / "plain", tmp_path / "out"
    other(smallest, pruned, halve)
    shutil.copytree(learned[0], plain)
    (plain / "report.json").unlink()
    capsys.readouterr()
    assert main(["adapters", "merge", str(pruned), str(plain), "--into", "-o", str(out)]) == 0
    told = capsys.readouterr()
    assert re.search(r"masked: [\d,]+ weights that were pruned stay zero", told.err)
    assert "merged" in told.out and told.out.splitlines()[-1] == str(out)
    assert main(["adapters", "merge", str(pruned), str(plain), "--into", "-o", str(out), "--overwrite", "-q"]) == 0
    assert capsys.readouterr().out == f"{out}\n"


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
