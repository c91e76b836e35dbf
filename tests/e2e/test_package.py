"""What `pip install .` gives works by itself, away from the repository."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

import llmshrink

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """`llmshrink` from a wheel in a fresh environment that borrows only the dependencies of this one."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("package")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", folder, ROOT], check=True, cwd=folder)
    (wheel,) = folder.glob("llmshrink-*.whl")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", *offline, wheel], check=True, cwd=folder)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    # A path file adds the folder behind the environment's own, and does not read the path files in it: an editable
    # installation of the repository there stays unseen.
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")
    found = subprocess.run(
        [python, "-I", "-c", "import llmshrink; print(llmshrink.__file__)"], capture_output=True, text=True
    )
    assert found.stdout.startswith(str(site)), found
    workplace = folder / "elsewhere"
    workplace.mkdir()

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        program = folder / "venv" / "bin" / "llmshrink"
        env = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(folder)}
        return subprocess.run([program, *arguments], cwd=workplace, env=env, capture_output=True, text=True)

    return call


def test_recipes_are_inside(command: Command) -> None:
    done = command("recipes", "ls")
    assert done.returncode == 0, done.stderr
    assert all(path.stem in done.stdout for path in (ROOT / "recipes").rglob("*.yaml"))


def test_the_embedded_model_is_inside(command: Command) -> None:
    done = command("plan", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["architecture"] == "LlamaForCausalLM"


def test_it_quantizes(command: Command) -> None:
    evaluation = ("--evaluation", "generator", "--set", "evaluation.rows=4", "--set", "evaluation.length=128")
    done = command("quantize", "--bits", "4", "--method", "rtn", "--json", *evaluation)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["llmshrink_version"] == llmshrink.__version__
    assert all(check["passed"] for stage in report["stages"] for check in stage["checks"])
    assert report["after"]["tensor_bytes"] < 0.5 * report["before"]["tensor_bytes"]
    assert command("verify", report["output"]).returncode == 0
