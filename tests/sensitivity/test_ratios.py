"""Shares of layers against what brute force gives: scores of the whole model, and all its weights in one row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Stopping, load, recipe
from tiny import build_model, config
from torch import Tensor

from llmshrink.calibration.rows import Rows
from llmshrink.errors import InterruptedRun
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.economy import Economy
from llmshrink.plan.ratios import Ratios
from llmshrink.progress import Silent
from llmshrink.recipe.stages import PruneStage
from llmshrink.sensitivity.ratios import FOUND, Found, bounded, by_outliers, choose, edge_of, histogram, outliers

ROWS = Rows(tuple(torch.randint(3, 150, (6, 32), generator=torch.Generator().manual_seed(5))), "random", "random")


def opened(folder: Path, text: Path, ratios: dict[str, Any], method: str = "magnitude", **more: Any) -> Ratios:
    settings = {"name": method, "sparsity": more.pop("sparsity", 0.6)}
    (stage,) = (made := recipe(folder, folder / "out", text, settings, stage={"ratios": ratios, **more})).stages
    assert isinstance(stage, PruneStage)
    return Ratios(made, stage, StreamedModel(open_source(str(folder)), torch.device("cpu")))


def found(ratios: Ratios, folder: Path, economy: Economy | None = None) -> Found:
    return choose(ratios, ROWS, economy=economy or Economy(64), folder=folder, progress=Silent())


# --- outliers


def test_outliers_are_counted_by_the_mean_of_all() -> None:
    scores = [torch.tensor([[0.0, 1.0], [2.0, 9.0]]), torch.tensor([4.0, 2.0])]  # mean 3
    values = [float(v) for score in scores for v in score.flatten()]
    for times in (0.5, 4 / 3, 1.4, 2.9, 3.1):
        wanted = sum(v > times * sum(values) / len(values) for v in values) / len(values)
        assert outliers(lambda: scores, times) == wanted
    assert outliers(lambda: [torch.tensor([1.0, torch.inf])], 5) != outliers(lambda: [torch.tensor([0.0])], 5) == 0


def test_shares_are_those_of_the_authors_code() -> None:
    outlying, sparsity, spread = [0.004, 0.001, 0.0025, 0.0012], 0.7, 0.08
    seen = torch.tensor(outlying, dtype=torch.float64)
    kept = (seen - seen.min()) * (1 / (seen.max() - seen.min()) * spread * 2)  # luuyin/OWL, lib/prune_all.py
    kept = kept - kept.mean() + (1 - sparsity)
    shares = by_outliers(outlying, [10] * 4, sparsity, spread)
    assert shares == pytest.approx((1 - kept).tolist(), abs=1e-12)
    assert max(shares) - min(shares) == pytest.approx(2 * spread) and shares[0] == min(shares)
    assert by_outliers([0.1, 0.1], [1, 2], sparsity, spread) == [sparsity] * 2


def test_the_mean_is_over_weights() -> None:
    sizes = [100, 700, 50]
    shares = by_outliers([0.01, 0.02, 0.03], sizes, 0.6, 0.1)
    assert sum(a * b for a, b in zip(shares, sizes, strict=True)) == pytest.approx(0.6 * sum(sizes))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_they_are_those_of_the_whole_model(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path, family: str
) -> None:
    folder = models_folder(family)
    ratios = opened(folder, text_file, {"name": "owl", "threshold": 2.5, "spread": 0.1})
    inputs: dict[str, Tensor] = {}
    model = load(folder)[0]
    for unit in ratios.units:
        for matrix in unit.matrices:

            def see(_: Any, x: tuple[Tensor, ...], name: str = matrix.site.module) -> None:
                inputs[name] = x[0].reshape(-1, x[0].shape[-1])

            model.get_submodule(matrix.site.module).register_forward_pre_hook(see)
    with torch.no_grad():
        model(torch.stack(ROWS.tokens))
    wanted = []
    for unit in ratios.units:
        read = ratios.model.read
        scores = [read(m).float().abs() * inputs[m.site.module].norm(dim=0) for m in unit.matrices]
        together = torch.cat([score.flatten() for score in scores])
        wanted.append(float((together > 2.5 * together.mean()).double().mean()))
    seen = found(ratios, tmp_path)
    assert len(ratios.units) == 2 and wanted[0] != wanted[1]
    assert seen.outliers == pytest.approx(wanted, abs=2e-5)  # a score at the very edge
    assert seen.shares == pytest.approx(by_outliers(wanted, ratios.sizes, 0.6, 0.1), abs=1e-9)


def test_thrift_changes_nothing(models_folder: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    ratios = opened(models_folder("llama"), text_file, {"name": "owl", "threshold": 2})
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert found(ratios, tmp_path / "a") == found(ratios, tmp_path / "b", Economy(64, on_disk=True))


# --- magnitudes


def test_the_edge_is_where_so_many_lie_below() -> None:
    values = torch.tensor([0.0, 0.5, 0.5, 0.5, -0.5, 2.0, -3.0, 7.0])
    counts = histogram(values)
    assert int(counts.sum()) == 8 and int(counts[0]) == 1
    at = int(torch.tensor(0.5).view(torch.int32)) >> 12
    assert edge_of(counts, 3) == (at, 0.5)
    assert edge_of(counts, 5) == (at, 1.0)
    assert edge_of(counts, 0)[1] == 0
    assert edge_of(counts, 6)[0] == int(torch.tensor(2.0).view(torch.int32)) >> 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_magnitude_for_all(text_file: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tmp_path / "model"
    build_model(folder, config("llama"), dtype)
    ratios = opened(folder, text_file, {"name": "global"})
    seen = found(ratios, tmp_path)
    weights = [torch.cat([ratios.model.read(m).float().abs().flatten() for m in u.matrices]) for u in ratios.units]
    together = torch.cat(weights)
    edge = together.kthvalue(round(0.6 * len(together))).values
    gone = sum(share * size for share, size in zip(seen.shares, ratios.sizes, strict=True))
    assert gone == pytest.approx(0.6 * len(together), abs=1e-3)
    assert seen.threshold == pytest.approx(float(edge), rel=1 / 2048)
    assert len({round(share, 3) for share in seen.shares}) > 3
    for weight, share in zip(weights, seen.shares, strict=True):
        if dtype == torch.bfloat16:  # each value has a bin: of those at the edge some go
            assert (weight < edge).double().mean() <= share <= (weight <= edge).double().mean()
        else:
            assert share == pytest.approx(float((weight <= edge).double().mean()), abs=1e-3)


def test_experts_that_are_alike_share(models_folder: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    ratios = opened(models_folder("qwen3-moe"), text_file, {"name": "global"}, sparsity=0.5)
    experts = [unit for unit in ratios.units if ".experts." in unit.name]
    assert len(experts) == 3 and all(len(unit.matrices) == 4 and len(unit.patterns) == 1 for unit in experts)
    assert len(found(ratios, tmp_path).shares) == len(ratios.units)


def test_an_expert_that_is_named_keeps_its_share(models_folder: Callable[..., Path], text_file: Path) -> None:
    """Though what is said of the others matches it too."""
    named = {r".*experts\.1\.up_proj": {"sparsity": 0.1}}
    ratios = opened(models_folder("qwen3-moe"), text_file, {"name": "owl"}, layers=named)
    (stage,) = ratios.recipe([0.5] * len(ratios.units)).stages
    assert isinstance(stage, PruneStage)
    for number, share in ((0, 0.5), (1, 0.1)):
        spec = stage.method_for(f"model.layers.0.mlp.experts.{number}.up_proj", stage.method)
        assert spec is not None and spec.settings["sparsity"] == share


# --- what a layer can bear


def test_no_share_leaves_its_range() -> None:
    sizes = [1, 2, 3]
    assert bounded([0.3, 0.5, 0.9], sizes, 0.99) == [0.3, 0.5, 0.9]
    for shares in ([1.4, 0.8, 0.7], [-0.2, 0.1, 0.3]):
        moved = bounded(shares, sizes, 0.99)
        mean = sum(a * b for a, b in zip(shares, sizes, strict=True)) / 6
        assert sum(a * b for a, b in zip(moved, sizes, strict=True)) / 6 == pytest.approx(mean, abs=1e-12)
        assert all(0 <= share <= 0.99 for share in moved)
        assert moved[2] - moved[1] == pytest.approx(shares[2] - shares[1])  # neither was cut


def test_it_is_told_where_a_share_was_cut(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    ratios = opened(smallest, text_file, {"name": "owl", "threshold": 2, "spread": 0.5}, sparsity=0.95)
    seen = found(ratios, tmp_path)
    assert max(seen.shares) == 0.99
    assert [event.kind for event in seen.events] == ["ratios_bounded"]


# --- kept


def test_what_was_found_is_not_looked_for_again(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    ratios = opened(smallest, text_file, {"name": "owl", "threshold": 2, "spread": 0.5}, sparsity=0.95)
    first = found(ratios, tmp_path)
    stopping = Stopping(step="find")
    assert choose(ratios, ROWS, economy=Economy(64), folder=tmp_path, progress=stopping) == first
    (tmp_path / FOUND).write_bytes((tmp_path / FOUND).read_bytes()[:-9])  # torn
    with pytest.raises(InterruptedRun):
        choose(ratios, ROWS, economy=Economy(64), folder=tmp_path, progress=stopping)
    assert found(ratios, tmp_path) == first
