"""Encoders from the folder to the report: as the Hub has them, and as their users load them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import recipe
from safetensors.torch import load_file, save_file
from tiny import build_model, config
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForPreTraining

from llmshrink import run
from llmshrink.errors import InputError, PlanError, UnsafeError
from llmshrink.evaluate.reader import ReadRequest, read
from llmshrink.progress import Silent
from llmshrink.report.schema import Report

METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"name": "rtn", "bits": 8, "group_size": 32},
    "nf4": {"name": "nf4", "block_size": 32},
}


def shrunk(source: Path, out: Path, text: Path, method: dict[str, Any], **more: Any) -> Report:
    evaluation = {"data": [str(text)], "rows": 6, "length": 24, "speed": False}
    return run.execute(recipe(source, out, text, method, evaluation=evaluation, **more), progress=Silent())


def difference(one: Path, other: Path, auto: Any) -> dict[str, float]:
    """Relative difference of all that two folders give out through one class."""
    ids = torch.randint(5, 150, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = (auto.from_pretrained(folder, dtype=torch.float32).eval()(ids) for folder in (one, other))
    return {name: float((a[name] - b[name]).norm() / b[name].norm()) for name in b}


@pytest.fixture(scope="module")
def as_on_the_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked model as BERT's own is stored: norms by their old names, with a pooler and a second head."""
    folder = tmp_path_factory.mktemp("hub") / "bert"
    build_model(folder, config("bert-masked"))
    path, generator = folder / "model.safetensors", torch.Generator().manual_seed(0)
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(path).items()
    }
    for name, rows in (("bert.pooler.dense", 64), ("cls.seq_relationship", 2)):
        tensors[f"{name}.weight"] = torch.randn(rows, 64, generator=generator)
        tensors[f"{name}.bias"] = torch.randn(rows, generator=generator)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_other_classes_load_the_result_too(
    as_on_the_hub: Path, text_file: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    """Loaders must know that a pooler or a head which this class does not have is not compressed."""
    out = tmp_path / "out"
    report = shrunk(as_on_the_hub, out, text_file, method)
    assert (report.model.task, report.model.auto_class) == ("fill-mask", "AutoModelForMaskedLM")
    assert report.after is not None and report.after.scores[0].top1 is not None
    assert [event.kind for event in report.events if "4 tensors" in event.message] == ["unused_tensors"]
    limit = 0.02 if method["name"] == "rtn" else 0.8  # a random pooler or head is off by 1.4
    for auto in (AutoModelForMaskedLM, AutoModel, AutoModelForPreTraining):
        found = difference(out, as_on_the_hub, auto)
        assert all(0 < value < limit for value in found.values()), (auto, found)


def test_an_encoder_without_its_pooler_is_whole(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    build_model(source, config("bert"))
    path = source / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("pooler.")}
    save_file(tensors, path, metadata={"format": "pt"})
    report = shrunk(source, tmp_path / "out", text_file, METHODS["rtn"])
    assert all(check.passed for check in report.stages[0].checks)
    del tensors["embeddings.LayerNorm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 parameters of BertModel .*embeddings.LayerNorm.weight"):
        shrunk(source, tmp_path / "broken", text_file, METHODS["rtn"])


@pytest.mark.parametrize(
    ("family", "changes", "scored"),
    [
        ("bert", {}, {"cosine", "relative_error"}),
        ("bert-masked", {}, {"kl", "top1"}),
        ("bert-classes", {}, {"kl", "top1"}),
        ("bert-classes", {"problem_type": "multi_label_classification"}, {"cosine", "relative_error"}),
        ("bert-classes", {"num_labels": 1}, {"relative_error"}),
        ("xlm-roberta-tokens", {}, {"kl", "top1"}),
    ],
)
def test_each_kind_is_measured_by_what_it_gives_out(
    text_file: Path, tmp_path: Path, family: str, changes: dict[str, Any], scored: set[str]
) -> None:
    source = tmp_path / "source"
    build_model(source, config(family, **changes))
    near, far = (
        shrunk(source, tmp_path / name, text_file, method)
        for name, method in (("w8", METHODS["rtn"]), ("w2", {**METHODS["rtn"], "bits": 2}))
    )
    assert near.before is not None and near.after is not None and near.before.scores == []
    score = near.after.scores[0]
    fields = ("perplexity", "kl", "top1", "cosine", "relative_error")
    assert {name for name in fields if getattr(score, name) is not None} == scored
    worse = far.after.scores[0]  # type: ignore[union-attr]
    for name in scored:
        lost = [
            1 - value if name in ("top1", "cosine") else value for value in (getattr(s, name) for s in (score, worse))
        ]
        assert 0 <= lost[0] <= lost[1] and lost[0] < 0.1, name
        assert lost[1] > 0 or name == "top1"


@pytest.mark.parametrize("pad", [None, 3])
def test_a_decoder_may_be_a_classifier(text_file: Path, tmp_path: Path, pad: int | None) -> None:
    changes = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 3, "pad_token_id": pad}
    build_model(tmp_path / "source", config("llama", **changes))
    report = shrunk(tmp_path / "source", tmp_path / "out", text_file, METHODS["rtn"])
    assert report.model.task == "text-classification" and all(check.passed for check in report.stages[0].checks)
    assert report.after is not None and report.after.scores[0].kl is not None


def test_two_encoders_are_compared_where_they_give_out_the_same(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    one = recipe(models_folder("bert"), tmp_path, text_file).model_dump(mode="json")
    one |= {
        "stages": [{"task": "eval"}],
        "output": None,
        "evaluation": {"data": [str(text_file)], "rows": 6, "length": 24, "speed": False},
    }
    validate = type(recipe(models_folder("bert"), tmp_path, text_file)).model_validate
    alone = run.execute(validate(one), progress=Silent())
    assert alone.before is not None and alone.before.scores == [] and alone.events == []
    one["evaluation"]["baseline"] = str(models_folder("bert"))
    same = run.execute(validate(one), progress=Silent())
    assert same.after is not None and same.after.scores[0].cosine == pytest.approx(1, abs=1e-12)
    one["evaluation"]["baseline"] = str(models_folder("bert-masked"))
    with pytest.raises(InputError, match="do not give out the same"):
        run.execute(validate(one), progress=Silent())


def test_an_encoder_is_timed_by_what_it_can_do(models_folder: Callable[..., Path]) -> None:
    found = read(ReadRequest(folder=str(models_folder("roberta")), prompt=[5, 6, 7], speed=True)).found
    assert found is not None and found.class_name == "RobertaModel"
    assert found.prefill_tokens_per_second is not None and found.prefill_tokens_per_second > 0
    assert found.decode_tokens_per_second is None and found.sample is None


def test_a_format_that_no_reader_takes_for_encoders_is_refused(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    wanted = recipe(models_folder("bert"), tmp_path / "out", text_file, stage={"format": {"name": "gptq"}})
    with pytest.raises(PlanError, match="it finds the blocks of causal models only"):
        run.execute(wanted, progress=Silent())


def test_how_sentences_are_pooled_goes_along(
    models_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(models_folder("bert"), tmp_path / "source")
    pooling = source / "1_Pooling"
    pooling.mkdir()
    files = {"modules.json": "[]", "sentence_bert_config.json": "{}", "1_Pooling/config.json": '{"cls": true}'}
    for name, text in files.items():
        (source / name).write_text(text)
    report = shrunk(source, tmp_path / "out", text_file, METHODS["rtn"])
    assert all((tmp_path / "out" / name).read_text() == text for name, text in files.items())
    assert set(files) <= set(report.model.files)
    assert all(check.passed for check in run.verify(tmp_path / "out", progress=Silent()))
    pooling.rename(tmp_path / "elsewhere")
    pooling.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeError, match="1_Pooling is a link out of"):
        shrunk(source, tmp_path / "unsafe", text_file, METHODS["rtn"])
