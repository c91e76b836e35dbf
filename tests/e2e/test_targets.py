"""Embeddings and heads compressed with the linears, or without: in every family that has them in a way of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Stopping, assert_loads_packed, close, content, decoded_model, load, logits, recipe
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from llmshrink import plugin, run
from llmshrink.cli import main
from llmshrink.errors import InterruptedRun, PlanError, RecipeError
from llmshrink.plugin import PackedEmbedding
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


@pytest.fixture(scope="module")
def tied(models_folder: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of which the matrix that is embedding and head has 4 bits, and nothing else is compressed."""
    out = tmp_path_factory.mktemp("tied") / "out"
    cluster(models_folder("llama-tied"), out, text_file, ["embedding"], bits=4)
    return out


@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {"keep": 0.6}), ("gemma3", {"rank": 5, "factor_bits": 8}), ("llama-tied", {"bits": 2, "rank": 2})],
)
def test_products_load(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    original, out = models_folder(family), tmp_path / "out"
    more = {"ratios": None, "targets": ["embedding", "head"]}
    data = recipe(original, out, text_file, {"name": "svdllm", **settings}, stage=more)
    (stage,) = run.execute(data, progress=Silent()).stages
    methods = [layer.method for layer in stage.layers if layer.method]
    assert methods == (["svd", "svdllm"] if family == "llama" else ["svdllm"])  # what is looked up has no inputs
    assert_loads_packed(stage, out, original, tmp_path / "again", 4e-5)


def test_layers_gives_the_embedding_bits_of_its_own(
    smallest: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = {"layers": {"embedding": {"bits": 6}}, "ignore": ["lm_head"]}
    (done,) = cluster(smallest, tmp_path / "out", text_file, ["linears", "embedding", "head"], stage, bits=2).stages
    bits = {layer.name: layer.bits for layer in done.layers}
    assert bits.pop("model.embed_tokens") == 6 and bits.pop("lm_head") is None
    assert {n for name, n in bits.items() if ".layers." in name and "norm" not in name} == {2}
    assert done.bytes_after == done.planned_bytes_after
    named = ["--targets", "linears, head", "--set", "layers={lm_head: {bits: 5}}"]
    assert main(["cluster", str(smallest), "--bits", "3", *named, "--plan"]) == 0
    assert "lm_head" in capsys.readouterr().out
    assert main(["cluster", str(smallest), "-r", "kmeans-w4-e6", "--json", "--plan"]) == 0
    outside = json.loads(capsys.readouterr().out)["outside"]
    assert [layer["bytes_after"] > 160 * 32 * 6 / 8 for layer in outside] == [True, True]


def test_what_does_not_exist_is_refused(
    models_folder: Callable[..., Path], smallest: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="names head, and BertModel has no such part") as refused:
        run.make_plan(wanted(models_folder("bert"), tmp_path / "out", text_file, ["linears", "head"]))
    assert "linears, embedding." in str(refused.value)
    with pytest.raises(RecipeError, match="'linears', 'embedding' or 'head'"):
        wanted(smallest, tmp_path / "out", text_file, ["heads"])
    with pytest.raises(RecipeError, match="'head' is there already"):
        wanted(smallest, tmp_path / "out", text_file, ["head", "head"])
    with pytest.raises(PlanError, match="not among the `targets`: name it there .--targets head."):
        run.make_plan(wanted(smallest, tmp_path / "out", text_file, ["linears"], {"layers": {"lm_head": {"bits": 8}}}))
    two = {"layers": {"embedding": {"bits": 6}, "head": {"bits": 4}}}
    with pytest.raises(PlanError, match="they are one matrix"):
        run.make_plan(wanted(models_folder("llama-tied"), tmp_path / "out", text_file, ["head"], two))
    with pytest.raises(PlanError, match="model.embed_tokens .160, 32.: rows 7 does not divide"):
        run.make_plan(wanted(smallest, tmp_path / "out", text_file, ["embedding"], rows=7))


@pytest.mark.parametrize("note", ["model.embed_tokens", "block 1"])
def test_a_stopped_run_gives_the_same_bytes(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path, tied: Path, note: str
) -> None:
    data = wanted(models_folder("llama-tied"), tmp_path / "out", text_file, ["head"], bits=4)
    with pytest.raises(InterruptedRun):
        run.execute(data, progress=Stopping(step="compress", note=note))
    run.execute(data, progress=Silent())
    assert content(tmp_path / "out") == content(tied)  # either name means the one matrix


def test_ids_without_a_row_are_refused(tied: Path) -> None:
    table = load(tied)[0].get_input_embeddings()
    for ids in ([0, -1], [160]):
        with pytest.raises(IndexError, match="are not among 160 rows"):
            table(torch.tensor([ids]))
    assert table(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, table.in_features)
    table.table.forward = None  # what is put there, as accelerate does, is of a table without rows
    assert table(torch.tensor([[3]])).shape == (1, 1, table.in_features)


def test_a_smoke_run_of_what_is_outside(smallest: Path) -> None:
    assert main(["cluster", str(smallest), "--targets", "embedding", "--preset", "fast", "--smoke", "--quiet"]) == 0


def test_export_writes_it_dense_and_once(tied: Path, models_folder: Callable[..., Path], tmp_path: Path) -> None:
    assert main(["export", str(tied), "--to", "compressed-tensors", "-o", str(tmp_path / "no"), "--quiet"]) == 3
    assert main(["export", str(tied), "--to", "codebook", "-o", str(tmp_path / "same"), "--quiet"]) == 0
    first, second = (load_file(next(folder.glob("*1-of*.safetensors"))) for folder in (tied, tmp_path / "same"))
    assert "model.embed_tokens.weight_table" in first
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert main(["export", str(tied), "--to", "dense", "-o", str(tmp_path / "out"), "--quiet"]) == 0
    stored = {key: value for file in (tmp_path / "out").glob("*.safetensors") for key, value in load_file(file).items()}
    right = decoded_model(tied, models_folder("llama-tied")).state_dict()
    assert "lm_head.weight" not in stored
    assert torch.equal(stored["model.embed_tokens.weight"], right["model.embed_tokens.weight"])


def test_evaluation_of_the_written_folder(tied: Path, other_text: Path, models_folder: Callable[..., Path]) -> None:
    arguments = ["eval", str(tied), "--baseline", str(models_folder("llama-tied")), "--evaluation", str(other_text)]
    arguments += ["--rows", "2", "--length", "32", "--quiet", "--set", "evaluation.speed=false"]
    assert main([*arguments, "--max-kl", "9"]) == 0
    assert main([*arguments, "--max-kl", "1e-9"]) == 9


def test_a_tied_matrix_is_in_memory_once(tied: Path) -> None:
    model = load(tied)[0]
    big = [b for b in (*model.parameters(), *model.buffers()) if b.numel() * b.itemsize >= 160 * 64 // 2]
    assert sum(buffer.numel() * buffer.itemsize for buffer in big if buffer.dtype == torch.uint8) == 160 * 64 // 2
    assert not any(tuple(buffer.shape) == (160, 64) for buffer in big)
    model.to(torch.bfloat16)  # which makes new buffers of those that are tied
    ids = torch.arange(20)[None]
    found = model(ids).logits
    assert found.dtype == torch.bfloat16
    table = model.get_input_embeddings()
    assert isinstance(table, PackedEmbedding)
    table.get_buffer("weight").zero_()
    table.get_buffer("weight_table").zero_()
    assert not model(ids).logits.any()


def test_one_other_code_is_seen_by_both(tied: Path) -> None:
    model = load(tied)[0]
    ids = torch.tensor([[40, 41, 42, 43]])  # without token 7
    with torch.no_grad():
        right, embedded = model(ids).logits, model.get_input_embeddings()(torch.tensor([7]))
        model.get_input_embeddings().get_buffer("weight")[7 * 32] ^= 0xF0  # row 7, 64 codes of 4 bits
        changed = (model(ids).logits != right).any(1)[0]
        assert changed.nonzero().flatten().tolist() == [7]
        assert (model.get_input_embeddings()(torch.tensor([7])) != embedded).any()


def test_dequantized_while_loading_it_stays_tied(tied: Path, tmp_path: Path) -> None:
    settings = AutoConfig.from_pretrained(tied)
    settings.quantization_config["dequantize"] = True
    model = AutoModelForCausalLM.from_pretrained(tied, config=settings, dtype=torch.float32)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert close(logits(model), logits(load(tied)[0]))
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight


class _Largest(TorchDispatchMode):
    """The most elements that any result has."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.found = max(self.found, tensor.untyped_storage().nbytes())
        return out


def test_neither_way_decodes_the_whole_matrix(tied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "STRETCH", 16 * 64)  # rows of the head at a time
    model, x = load(tied)[0], torch.randn(2, 64)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    with torch.no_grad():
        right = x @ table.weight_in(torch.float32).T
        for call in (lambda: table(torch.tensor([[3, 5], [3, 159]])), lambda: head(x)):
            with _Largest() as largest:
                found = call()
            assert largest.found < 160 * 64 * 2  # of 4 bytes for each weight
    assert torch.allclose(found, right, atol=1e-5)


def test_padding_stays_zero(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    """A norm makes what is left of a row of zeros as large as any other state."""
    model = tmp_path / "model"
    _copied(smallest, model, lambda tensors: tensors["model.embed_tokens.weight"][3].zero_())
    cluster(model, tmp_path / "out", text_file, ["embedding"], bits=3)
    rows = load(tmp_path / "out")[0].get_input_embeddings()(torch.arange(5))
    assert not rows[3].any() and rows[2].any() and rows[4].any()


def test_a_copy_of_a_tied_head_is_left_out(models_folder: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    """transformers would take a copy that is no longer equal for a head of its own."""
    model = tmp_path / "model"

    def copied(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    _copied(models_folder("llama-tied"), model, copied)
    (stage,) = cluster(model, tmp_path / "out", text_file, ["head"], bits=3).stages
    assert_loads_packed(stage, tmp_path / "out", model, tmp_path / "again")


def _copied(source: Path, target: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """A model whose tensors are changed."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def test_bits_of_all_are_chosen_to_a_size(models_folder: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    allocate = {"bpw": 24.4, "candidates": [{"bits": 2}, {"bits": 5}], "rows": 2, "length": 16}
    stage = {"allocate": allocate, "ignore": [r".*\.1\..*", ".*mlp.*"]}
    data = wanted(models_folder("llama-tied"), tmp_path / "out", text_file, ["linears", "head"], stage)
    (done,) = run.execute(data, progress=Silent()).stages
    assert done.allocation is not None
    assert any("embed_tokens" in name for unit in done.allocation.units for name in [str(unit)])
    assert {layer.bits for layer in done.layers if layer.method} == {2, 5}


def test_learned_blocks_start_from_the_written_embedding(smallest: Path, text_file: Path, tmp_path: Path) -> None:
    stage = {"reconstruct": {"steps": 20, "tokens": 192}}
    (done,) = cluster(smallest, tmp_path / "out", text_file, ["linears", "embedding", "head"], stage, bits=2).stages
    assert sum(block.error_after for block in done.blocks) < sum(block.error_before for block in done.blocks)
    assert all(check.passed for check in done.checks)
