"""`llmshrink recipes`."""

import json

import pytest

from llmshrink.cli import main
from llmshrink.recipe import load


def test_list(capsys):
    assert main(["recipes", "ls"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in load.built_in())
    assert all(line == line.rstrip() for line in out.splitlines())
    assert main(["recipes", "ls", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["nf4"]["task"] == "quantize"
    assert rows["nf4"]["summary"].startswith("4-bit NormalFloat")


def test_show(capsys):
    assert main(["recipes", "show", "gptq-w8"]) == 0
    assert capsys.readouterr().out == load.resolve_name("gptq-w8").read_text()
    assert main(["recipes", "show", "gptq-w8", "--full"]) == 0
    full = load.text.parse(capsys.readouterr().out, "shown")
    assert full["calibration"]["samples"] == 128
    assert full["stages"][0]["method"]["damp"] == 0.01


def test_copy(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "cp", "nf4"]) == 0
    assert capsys.readouterr().out == "nf4.yaml\n"
    copied = tmp_path / "nf4.yaml"
    assert load.load(str(copied)) == load.load("nf4")
    assert "schema.json" not in copied.read_text()
    copied.write_text("mine")
    assert main(["recipes", "cp", "nf4"]) == 7
    assert copied.read_text() == "mine"
    assert main(["recipes", "cp", "nf4", "nf4.yaml", "--overwrite"]) == 0
    assert copied.read_text() != "mine"
    assert main(["recipes", "cp", "nf4", "no/such/folder/x.yaml"]) == 7


def test_validate(capsys, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("version: 1\nstages: [{task: evil}]\noutptu: x")
    assert main(["recipes", "validate", "nf4", str(bad), "nf5"]) == 3
    out, err = capsys.readouterr()
    assert out == "nf4: ok\n"
    assert "2 of 3 recipes refused" in err
    assert "stages[0].task: there is no task 'evil'; did you mean 'eval'?" in err
    assert "outptu: unknown key; did you mean 'output'?" in err
    assert "nf5: no built-in recipe of this name" in err
    assert main(["recipes", "validate", "-q", "nf4"]) == 0
    assert capsys.readouterr().out == ""


def test_schema(capsys):
    assert main(["recipes", "schema"]) == 0
    assert capsys.readouterr().out == (load.recipes_folder() / "schema.json").read_text()


@pytest.mark.parametrize("command", ["show", "cp"])
def test_unknown_name(capsys, command):
    assert main(["recipes", command, "gptq-w4"]) == 3
    assert "did you mean 'gptq-w8'?" in capsys.readouterr().err
