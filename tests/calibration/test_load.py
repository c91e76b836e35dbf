"""From the words of a recipe to rows: what is chosen, and what is told about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import TEXT

from llmshrink.calibration import load, sample
from llmshrink.calibration.load import TextLoader
from llmshrink.errors import PlanError, ResourceError
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.progress import Silent
from llmshrink.recipe.schema import CalibrationSpec, EvaluationSpec

CPU = torch.device("cpu")
Loader = Callable[..., TextLoader]


@pytest.fixture
def loader(models_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Loader:
    monkeypatch.setattr(load, "_hub_answers", lambda: False)

    def make(family: str = "llama", *, embedded: bool = False) -> TextLoader:
        return TextLoader(
            StreamedModel(open_source(str(models_folder(family))), CPU), embedded=embedded, progress=Silent()
        )

    return make


def calibration(data: str, **more: object) -> CalibrationSpec:
    return CalibrationSpec(data=data, **{"samples": 5, "length": 12, **more})


def evaluation(*data: str, **more: object) -> EvaluationSpec:
    return EvaluationSpec(data=list(data), **{"rows": 4, "length": 12, **more})


def test_a_file_by_name_wins(loader: Loader, text_file: Path) -> None:
    made = loader()
    found = made.calibration(calibration(str(text_file)), 12)
    assert (found.data, found.origin, len(found.tokens), made.events) == (str(text_file), text_file.name, 5, [])


def test_seeds_draw_other_rows(loader: Loader, text_file: Path) -> None:
    prints = [loader().calibration(calibration(str(text_file), seed=s), 12).fingerprint for s in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


def test_too_few_rows_are_told(loader: Loader, text_file: Path) -> None:
    made = loader()
    found = made.calibration(calibration(str(text_file), samples=10_000), 12)
    assert [event.kind for event in made.events] == ["few_rows"]
    assert str(len(found.tokens)) in made.events[0].message and len(TEXT) < len(found.tokens) < 10_000


def test_auto_is_the_generator_for_the_embedded_model_and_its_own_samples_for_others(loader: Loader) -> None:
    made = loader(embedded=True)
    assert made.calibration(calibration("auto"), 12).data == "generator" and made.events == []
    made = loader()
    assert made.calibration(calibration("auto"), 12).data == "self"
    assert [event.kind for event in made.events] == ["self_calibration"]


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_samples_of_the_model_depend_on_the_seed_alone(loader: Loader, family: str) -> None:
    made = loader(family)
    torch.manual_seed(1)
    first = made.calibration(calibration("self", samples=3), 12)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))  # the random numbers of the process are left alone
    torch.manual_seed(2)
    assert loader(family).calibration(calibration("self", samples=3), 12).fingerprint == first.fingerprint
    assert loader(family).calibration(calibration("self", samples=3, seed=1), 12).fingerprint != first.fingerprint
    assert [len(row) for row in first.tokens] == [12] * 3
    assert all(row[0] == 0 for row in first.tokens)  # BOS
    assert len({tuple(row.tolist()) for row in first.tokens}) == 3


def test_a_model_without_bos_starts_anywhere(loader: Loader) -> None:
    made = loader()
    made._model.source.tokenizer.bos_token = None
    found = made.calibration(calibration("self", samples=8), 12)
    assert len({int(row[0]) for row in found.tokens}) > 1


def test_a_model_too_large_to_sample_from_is_told(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "available_memory", lambda: 1000)
    with pytest.raises(ResourceError, match="--calibration FILE") as caught:
        loader().calibration(calibration("self"), 12)
    assert caught.value.exit_code == 6


def test_no_sample_or_story_is_both_calibrated_and_evaluated_on(loader: Loader) -> None:
    made = loader(embedded=True)
    for data in ("self", "generator"):
        rows = made.calibration(calibration(data), 12)
        (other,) = made.evaluation(evaluation(data), 12, rows)
        seen = {row.numpy().tobytes() for row in rows.tokens}
        assert not any(row.numpy().tobytes() in seen for row in other.tokens)
    assert made.events == []


def test_a_shared_text_is_told(loader: Loader, text_file: Path, other_text: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"
    copy.write_bytes(text_file.read_bytes())
    made = loader()
    rows = made.calibration(calibration(str(text_file)), 12)
    found = made.evaluation(evaluation(str(text_file), str(other_text), str(copy), str(other_text)), 12, rows)
    assert [text.data for text in found] == [str(text_file), str(other_text), str(copy)]  # each once
    assert [event.kind for event in made.events] == ["shared_corpus"] * 2
    assert text_file.name in made.events[0].message and copy.name in made.events[1].message


def test_other_rows_of_the_same_text_are_shared_too(loader: Loader, text_file: Path) -> None:
    made = loader()
    rows = made.calibration(calibration(str(text_file), seed=1), 60)
    (found,) = made.evaluation(evaluation(str(text_file)), 60, rows)
    assert not any(torch.equal(a, b) for a in rows.tokens for b in found.tokens)
    assert [event.kind for event in made.events] == ["shared_corpus"]


def test_generated_text_of_one_split_is_shared(loader: Loader) -> None:
    made = loader(embedded=True)
    rows = made.calibration(calibration("generator"), 12)
    made.evaluation(EvaluationSpec(data=["generator"], rows=5, length=12, split="train"), 12, rows)
    assert [event.kind for event in made.events] == ["shared_corpus"]


def test_another_split_of_one_dataset_is_a_notice(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"train": ["a fox went to the river"] * 40, "test": ["a heron sat by the market"] * 40}
    monkeypatch.setattr(load, "documents", lambda data, *, seed, split, column: iter(texts[split]))
    made = loader()
    rows = made.calibration(calibration("owner/data"), 12)
    made.evaluation(evaluation("owner/data"), 12, rows)
    assert [event.kind for event in made.events] == ["related_corpus"]


def test_auto_evaluates_on_two_texts(loader: Loader) -> None:
    found = loader().evaluation(evaluation("auto"), 12, None)
    assert [text.data for text in found] == ["generator", "self"]
    assert [len(text.tokens) for text in found] == [4, 4]


def test_an_encoder_is_calibrated_on_stories_where_there_is_nothing_else(loader: Loader) -> None:
    made = loader("bert")
    assert made.calibration(calibration("auto"), 12).data == "generator"
    assert [event.kind for event in made.events] == ["generator_calibration"]
    assert [rows.data for rows in made.evaluation(evaluation("auto"), 12, None)] == ["generator"]
    with pytest.raises(PlanError, match="predicts no next token"):
        made.calibration(calibration("self"), 12)
