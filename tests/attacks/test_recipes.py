"""Recipes from strangers: YAML that runs, swells or never ends, and expressions that never match."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from llmshrink.cli import main

START = "version: 1\nstages:\n  - task: quantize\n"


def bomb() -> str:
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    return START + "\n".join(lines)


UNSAFE: dict[str, tuple[str, str]] = {
    "python call": (
        START + "output: !!python/object/apply:os.system ['touch {canary}']",
        "python/object/apply:os.system",
    ),
    "python new": (START + "output: !!python/object/new:os.system ['touch {canary}']", "is not allowed"),
    "python module": (START + "output: !!python/module:antigravity", "is not allowed"),
    "python name": (START + "output: !!python/name:os.system", "is not allowed"),
    "verbatim": (START + "output: !<tag:yaml.org,2002:python/name:os.system> x", "is not allowed"),
    "prefix": ("%TAG !p! tag:yaml.org,2002:python/\n---\n" + START + "output: !p!name:os.system x", "is not allowed"),
    "own tag": (START + "output: !env HF_TOKEN", "line 4, column 9: the tag !env is not allowed"),
    "tag of a key": (START + "!!python/name:os.system : 1", "is not allowed"),
    "binary": (START + "output: !!binary aGVsbG8=", "is not allowed"),
    "billion laughs": (bomb(), "its aliases stand for more than"),
    "itself": (START + "more: &a [*a]", "contains itself"),
    "aliases": (START + "a: &a 1\nb: [" + "*a," * 101 + "]", "more than 100 aliases"),
    "10 MB": ("# " + "x" * 10_000_000, "larger than 1,000,000 bytes"),
    "10 MB of values": ("- a\n" * 2_500_000, "larger than 1,000,000 bytes"),
    "values": (START + "output: [" + "a," * 400_000 + "]", "more than 20,000 values"),
    "deep": ("[" * 200_000, "nested deeper than 32 levels"),
    "deep mappings": ("\n".join(" " * i + "a:" for i in range(1000)), "nested deeper than 32 levels"),
    "escapes of a terminal": (
        START + r'model: {id: "\e]0;owned\a\e[2J"}',
        "model.id: control characters in '\\x1b]0;owned",
    ),
    "a zero byte": (START + r'model: {id: "a\0b"}', "model.id: control characters"),
    "half a character": (START + r'model: {id: "\ud800"}', "model.id: control characters"),
    "8-bit controls": (START + r'model: {id: "\x9b31m"}', "model.id: control characters"),
    "escapes in a key": (START + r'"\e[2J": 1', "control characters"),
}


@pytest.mark.parametrize(("text", "words"), UNSAFE.values(), ids=UNSAFE)
def test_a_recipe_that_is_an_attack(
    attack: Callable[..., str], tmp_path: Path, canary: Path, text: str, words: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace("{canary}", str(canary) + "2"))
    said = attack(5, "--recipe", path)
    assert str(path) in said and words in said
    assert main(["recipes", "validate", str(path)]) == 5


MISTAKEN: dict[str, tuple[bytes, str]] = {
    "a key twice": (b"version: 1\nversion: 1", "line 2, column 1: the key 'version' is there twice"),
    "not UTF-8": (b"\xff\xfe\x00", "not UTF-8"),
    "a zero byte": (b"version: 1\0", "not YAML"),
    "an integer of 10,000 digits": (b"version: " + b"9" * 10_000, "a number of 10,000 digits"),
    "a hexadecimal of 900,000 digits": (b"version: 0x" + b"f" * 900_000, "a number of 900,002 digits"),
    "a float without end": (
        START.encode() + b"calibration: {seed: " + b"9" * 500_000 + b".5}",
        "calibration.seed",
    ),
    "an endless key": (START.encode() + b"? " + b"k" * 900_000 + b"\n: 1", "unknown key"),
    "an endless value": (START.encode() + b"calibration: {seed: " + b"v" * 900_000 + b"}", "calibration.seed"),
    "a surrogate of UTF-16": (b"\xed\xa0\x80: 1", "not UTF-8"),
    "a pickle": (b"\x80\x04\x95\x1f\0\0\0\0\0\0\0", "not UTF-8"),
    "no character": (START.encode() + b'output: "\\UFFFFFFFF"', "not YAML"),
    "many documents": (b"a: 1\n" + b"---\na: 1\n" * 1000, "single document"),
    "nothing": (b"", "a recipe is a mapping"),
}


@pytest.mark.parametrize(("content", "words"), MISTAKEN.values(), ids=MISTAKEN)
def test_a_recipe_that_is_damaged(attack: Callable[..., str], tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    said = attack(3, "--recipe", path)
    assert str(path) in said and words in said


@pytest.mark.parametrize("seed", range(20))
def test_a_recipe_of_random_bytes(attack: Callable[..., str], tmp_path: Path, seed: int) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(START.encode() + random.Random(seed).randbytes(200))
    attack(3, "--recipe", path)


def test_a_pipe_or_a_device_is_no_recipe(attack: Callable[..., str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe.yaml", tmp_path / "zero.yaml", "/dev/zero", "/dev/stdin"):
        assert str(path) in attack(3, "--recipe", path)
        assert main(["recipes", "show", str(path)]) == 3 and main(["recipes", "cp", str(path), str(tmp_path)]) == 3


def test_a_link_to_a_recipe_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "real.yaml").write_text(START)
    (tmp_path / "link.yaml").symlink_to(tmp_path / "real.yaml")
    assert main(["recipes", "validate", str(tmp_path / "link.yaml")]) == 0


def test_showing_a_recipe_sends_nothing_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text("# \x1b[2J\x07\x9b1m\u202e\n" + START)
    assert main(["recipes", "show", str(tmp_path / "r.yaml")]) == 0
    shown = capsys.readouterr().out
    assert r"\x1b[2J\x07\x9b1m" in shown and shown.replace("\n", "").isprintable() and START in shown


ENDLESS = [r"(?:(.+)(.+)(.+)(.+)(.+)(.+)(.+)(.+)(.+)(.+)(.+)(.+)\1\2\3\4)+", r"(?:(.)|(..)|(.*))*(?<=[0-9])"]


@pytest.mark.parametrize("pattern", ENDLESS)
@pytest.mark.parametrize("key", ["ignore=['{}']", "layers={{'{}': skip}}"])
def test_an_expression_that_never_ends(attack: Callable[..., str], model: Path, key: str, pattern: str) -> None:
    said = attack(5, model, "--set", key.format(pattern), "--method", "rtn")
    assert "takes longer than 1 s" in said and repr(pattern) in said


@pytest.mark.parametrize("pattern", ["([a-z._0-9]+)+!", "(.*)*!", "(a|a|[a-z._0-9])*!", "(?:(?:(?:.?){50}){50}){50}!"])
def test_an_expression_that_only_looks_endless_matches_nothing(
    attack: Callable[..., str], model: Path, pattern: str
) -> None:
    assert "matches no layer" in attack(3, model, "--set", f"ignore=['{pattern}']", "--method", "rtn")


@pytest.mark.parametrize("pattern", ["(" * 5000 + ")" * 5000, "x{99999999999999999999}", "(?P<a>", "[", "(?<=.*)("])
def test_an_expression_that_is_none(attack: Callable[..., str], model: Path, pattern: str) -> None:
    assert "not a regular expression" in attack(3, model, "--set", f"ignore=['{pattern}']")


SECRET = "S3cr3tV4lue"
WITH_SECRET = [
    f"token: {SECRET}",
    f"api_key: {SECRET}",
    f"model: {{id: x, hf_token: {SECRET}}}",
    f"model: {{id: x, apiKey: {SECRET}}}",
    f"run: {{aws_secret_access_key: {SECRET}}}",
    f"calibration: {{password: {SECRET}}}",
    f"evaluation: {{credentials: {SECRET}}}",
    f"stages: [{{task: quantize, secret: {SECRET}}}]",
    f"stages: [{{task: quantize, method: {{name: gptq, access_token: {SECRET}}}}}]",
    f"stages: [{{task: quantize, layers: {{'.*': {{token: {SECRET}}}}}}}]",
    f"stages: [{{task: quantize, format: {{name: dense, password: [{SECRET}]}}}}]",
]


@pytest.mark.parametrize("line", WITH_SECRET)
def test_a_recipe_with_a_secret_is_refused_without_repeating_it(
    attack: Callable[..., str], tmp_path: Path, line: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"version: 1\n{line}\n" + ("" if "stages" in line else "stages: [{task: quantize}]\n"))
    said = attack(3, "--recipe", path)
    assert "hf auth login" in said and "HF_TOKEN" in said and SECRET not in said


@pytest.mark.parametrize(
    "setting", ["token={}", "hf_token={}", "model.api_key={}", "method.token={}", "layers={{'.*': {{secret: {}}}}}"]
)
def test_a_setting_with_a_secret_is_refused_without_repeating_it(attack: Callable[..., str], setting: str) -> None:
    said = attack(3, "--set", setting.format(SECRET))
    assert "hf auth login" in said and SECRET not in said


@pytest.mark.parametrize(("setting", "code"), [(f"token: {SECRET}", 2), (f"={SECRET}", 2), (f"model=[{SECRET}", 3)])
def test_a_setting_that_cannot_be_read_is_not_repeated(attack: Callable[..., str], setting: str, code: int) -> None:
    assert SECRET not in attack(code, "--set", setting)
