"""Names from strangers: of tensors, folders, texts, licences. On a terminal and in a page they are only text."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from llmshrink.cli import main

Refused = Callable[..., tuple[int, str, set[str]]]
EVIL = [
    "\x1b[2J\x1b]0;owned\x07\x1b[31m",
    "\x9b31m\x85\u202e\u2066x",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "[red]x[/red][link=http:evil]y[/link]",
    "](javascript:alert(1)) ![x](http:evil.png) `code` **bold** | cell |",
    "x\n---\nlicense: evil\nbase_model: evil\n---\n# Title\n```yaml\n",
    "\n\nllmshrink: all is well\nout",
    "${HF_TOKEN} $(id) {{ 7 * 7 }} %s %n {0.__class__}",
]


def is_only_text(said: str) -> bool:
    return said.replace("\n", "").isprintable()


def check_output(folder: Path) -> None:
    """The files for people hold no control characters, and nothing that a page would take for more than text."""
    card = (folder / "README.md").read_text()
    assert is_only_text(card)
    _, front, body = card.split("---\n", 2)
    data = yaml.safe_load(front)
    assert set(data) <= {"base_model", "base_model_relation", "license", "library_name", "pipeline_tag", "tags"}
    assert data.get("license") != "evil" and "evil" not in str(data.get("base_model"))
    outside = re.sub(r"(?ms)^(```+)\w*\n.*?^\1$", "", body)
    assert not re.search(r"<\w|(?<!\\)\]\(|(?<!\\)!\[", outside), outside
    assert sum(line.startswith("# ") for line in outside.splitlines()) == 1
    for name in ("report.json", "recipe.yaml", "llmshrink-manifest.json"):
        assert is_only_text((folder / name).read_text()), name
    json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("evil", EVIL, ids=range(len(EVIL)))
def test_a_tensor_with_an_evil_name(
    refused: Refused, without_reader: None, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], evil: str
) -> None:
    """No parameter takes it, which is told; in place of another tensor it is an error, which names it."""
    path = model / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, f"{evil}.weight": tensors["model.norm.weight"].clone()}, path, metadata={"format": "pt"})
    for arguments in ([], ["--json"], ["--plan"], ["--plan", "--json"], ["--quiet"], ["--verbose"]):
        settings = ["--method", "rtn", "--group-size", "32", "--set", "evaluation.data=[]"]
        settings += ["--set", "evaluation.speed=false", "--output", str(tmp_path / "out"), "--overwrite"]
        assert main(["quantize", str(model), *settings, *arguments]) == 0
        shown = capsys.readouterr()
        assert is_only_text(shown.out + shown.err), arguments
    check_output(tmp_path / "out")
    bad = torch.full((3,), float("nan"))
    save_file({f"{evil}.weight": bad, **tensors}, path, metadata={"format": "pt"})
    shutil.rmtree(tmp_path / "out")
    for more in ([], ["--verbose"]):
        code, said, _ = refused(model, *more)
        assert code == 8 and "NaN" in said and is_only_text(said)


@pytest.mark.parametrize("evil", EVIL, ids=range(len(EVIL)))
def test_a_folder_and_a_text_with_evil_names(
    without_reader: None, model: Path, tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str], evil: str
) -> None:
    """What has control characters in its name is refused, and told in visible ones."""
    name = evil.replace("/", "\u2215")
    folder, text = model.rename(tmp_path / name), tmp_path / f"{name}.json"
    shutil.copy(text_file, text)
    settings = ["--samples", "4", "--length", "16", "--set", "evaluation.speed=false", "--group-size", "32"]
    settings += ["--set", "evaluation.rows=2"]
    out = tmp_path / "out"
    arguments = ["quantize", str(folder), "--calibration", str(text), "--evaluation", str(text), "--output", str(out)]
    code = main([*arguments, *settings])
    shown = capsys.readouterr()
    assert is_only_text(shown.out + shown.err)
    if any(c < " " and c not in "\n" or "\x7f" <= c <= "\x9f" for c in name):
        assert code == 5 and not out.exists() and "control characters" in shown.err
    else:
        assert code == 0, shown.err
        check_output(out)
        assert main(["verify", str(out)]) == 0
    main(["quantize", str(folder / "nothing")])
    main(["verify", str(folder)])
    shown = capsys.readouterr()
    assert is_only_text(shown.out + shown.err) and "internal error" not in shown.err


@pytest.mark.parametrize("evil", EVIL, ids=range(len(EVIL)))
def test_a_licence_with_an_evil_name(
    refused: Refused, without_reader: None, model: Path, tmp_path: Path, evil: str
) -> None:
    (model / "README.md").write_text(f"---\nlicense: {evil}\nbase_model: {evil}\n---\n{evil}")
    config = model / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": [evil], "_name_or_path": evil}))
    code, said, _ = refused(model, "--method", "rtn")
    assert code == 0 and is_only_text(said)
    check_output(tmp_path / "out")


@pytest.mark.parametrize("evil", EVIL, ids=range(len(EVIL)))
def test_a_model_that_says_evil_things(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], evil: str, text_file: Path
) -> None:
    """What a model continues a prompt with is decoded by a tokenizer of the same stranger."""
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["decoder"] = {"type": "Replace", "pattern": {"Regex": ".*"}, "content": evil}
    path.write_text(json.dumps(tokenizer))
    for arguments in ([], ["--json"]):
        code = main(["eval", str(model), "--evaluation", str(text_file), "--rows", "1", "--length", "16", *arguments])
        shown = capsys.readouterr()
        assert code == 0 and is_only_text(shown.out + shown.err), shown.err


@pytest.mark.parametrize("evil", EVIL, ids=range(len(EVIL)))
def test_settings_with_evil_words(attack: Callable[..., str], model: Path, evil: str) -> None:
    config = model / "config.json"
    data = json.loads(config.read_text())
    for keys in ({"model_type": evil}, {"hidden_act": evil}, {"quantization_config": {"quant_method": evil}}):
        config.write_text(json.dumps({**data, **keys}))
        attack(3 if "quantization_config" in keys else 8, model)


@pytest.mark.parametrize("option", ["--method", "--format", "--device", "--calibration", "--recipe", "--set", "--evil"])
def test_arguments_with_evil_words(refused: Refused, model: Path, option: str) -> None:
    for evil in EVIL:
        code, said, left = refused(model, option, evil)
        assert code in (2, 3, 4, 5, 8) and is_only_text(said) and not left, said
