"""Embeddings and heads compressed with the linears, or without: in every family that has them in a way of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_loads_packed, recipe

from llmshrink import run
from llmshrink.progress import Silent
from llmshrink.recipe.schema import Recipe
from llmshrink.report.schema import Report

pytestmark = pytest.mark.usefixtures("without_reader")
# Tied and not, scaled, projected, renamed on disk, beside learned positions, beside experts, without a head.
OWN_WAYS = {
    "llama": ["embedding", "head"],
    "llama-tied": ["head"],
    "gemma2": ["embedding"],
    "gemma3": ["linears", "embedding", "head"],
    "gpt2": ["embedding"],
    "opt": ["linears", "head"],
    "opt-projected": ["embedding"],
    "gpt-neox": ["embedding", "head"],
    "falcon": ["embedding"],
    "bloom": ["embedding"],
    "mixtral": ["embedding", "head"],
    "bert": ["embedding"],
    "bert-masked": ["linears", "head"],
    "electra": ["embedding"],
    "modernbert": ["embedding"],
}


def wanted(model: Path, out: Path, text: Path, targets: list[str], stage: Any = None, **settings: Any) -> Recipe:
    method = {"name": "kmeans", **settings}
    return recipe(model, out, text, method, stage={"targets": targets, **(stage or {})})


def cluster(model: Path, out: Path, text: Path, targets: list[str], stage: Any = None, **settings: Any) -> Report:
    return run.execute(wanted(model, out, text, targets, stage, **settings), progress=Silent())


@pytest.mark.parametrize("family", OWN_WAYS)
def test_every_family_loads(models_folder: Callable[..., Path], text_file: Path, tmp_path: Path, family: str) -> None:
    original, out = models_folder(family), tmp_path / "out"
    (stage,) = cluster(original, out, text_file, OWN_WAYS[family], bits=3).stages
    assert stage.format == "codebook"
    assert_loads_packed(stage, out, original, tmp_path / "again")
