"""Results side by side: the same numbers as in their reports, and the front by brute force."""

from __future__ import annotations

import itertools
import json
import random
import statistics
from pathlib import Path

import pytest
from helpers import recipe
from tiny import build_model, config

from llmshrink import run
from llmshrink.cli import main
from llmshrink.errors import InputError
from llmshrink.progress import Silent
from llmshrink.report.compare import compare, front, markdown, paired, read_report


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> list[Path]:
    """One model in 8, 4 and 2 bits, and another model."""
    root = tmp_path_factory.mktemp("results")
    small = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
    found = []
    for name, bits in (("model", 8), ("model", 4), ("model", 2), ("another", 4)):
        if not (root / name).exists():
            build_model(root / name, config("llama", tie_word_embeddings=name == "another", **small))
        out = root / f"{name}|{bits}"
        given = recipe(root / name, out, text_file, {"name": "rtn", "bits": bits, "group_size": 16})
        texts = {"data": [str(text_file)], "rows": 4, "length": 16, "speed": False}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("llmshrink.job.check_reader", lambda *_: run.Check(name="reader", passed=True, detail=""))
            run.execute(
                given.model_copy(update={"evaluation": given.evaluation.model_validate(texts)}), progress=Silent()
            )
        found.append(out)
    return found


def test_numbers_are_those_of_the_reports(results: list[Path]) -> None:
    reports = {path.name: read_report(path) for path in results[:3]}
    found = compare(reports)
    assert [entry.name for entry in found.entries] == list(reports) and not found.left_out
    assert found.original is not None and found.original.texts[0].kl is None
    first = reports["model|8"].after
    for entry, report in zip(found.entries, reports.values(), strict=True):
        assert report.after is not None and first is not None
        (text,), (score,) = entry.texts, report.after.scores
        assert (entry.tensor_bytes, text.kl, text.perplexity) == (report.after.tensor_bytes, score.kl, score.perplexity)
        if entry is not found.entries[0]:
            assert text.more == pytest.approx(score.kl - first.scores[0].kl, abs=1e-9)  # type: ignore[operator]
    assert all(entry.front for entry in found.entries)  # fewer bits, more KL


def test_the_commands_tell_it(results: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(path) for path in results[:3]]
    assert main(["compare", *given]) == 0
    told = capsys.readouterr().out
    assert "quantize rtn" in told and "no other is as small" in told
    assert main(["compare", *given, "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "\\|" in lines[5] and len({line.replace("\\|", "").count("|") for line in lines[2:8]}) == 1
    assert main(["compare", *given, "--json"]) == 0
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)["entries"]] == [
        "model|8",
        "model|4",
        "model|2",
    ]
    assert main(["compare", *given, given[0]]) == 2


def test_what_cannot_be_compared_is_refused(results: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="another|4 was made from"):
        compare({path.name: read_report(path) for path in results})
    with pytest.raises(InputError, match="no report.json can be read"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(InputError, match="no report of this version"):
        read_report(tmp_path)
    report = read_report(results[0])
    with pytest.raises(InputError, match="nothing was measured"):
        compare({"a": report, "b": report.model_copy(update={"after": None})})
    other = report.after.scores[0].model_copy(update={"fingerprint": "x", "dataset": "y.txt"})  # type: ignore[union-attr]
    more = report.after.model_copy(update={"scores": [*report.after.scores, other]})  # type: ignore[union-attr]
    assert compare({"a": report, "b": report.model_copy(update={"after": more})}).left_out == ["y.txt"]
    assert "y.txt" in markdown(compare({"a": report, "b": report.model_copy(update={"after": more})})).replace("\\", "")


def test_the_front_is_what_nothing_beats() -> None:
    generator = random.Random(0)
    points = [(generator.randrange(6), generator.randrange(6) / 4) for _ in range(40)]
    found = front([*points, (None, 0.0), (0, None)])
    for (size, kl), on in zip(points, found, strict=False):
        better = [p for p in points if (p[0] < size and p[1] <= kl) or (p[0] <= size and p[1] < kl)]
        assert on == (not better)
    assert found[-2:] == [False, False] and any(found)


def test_the_error_of_a_paired_difference() -> None:
    ones, others = [1.0, 4.0, 2.0, 6.0], [0.5, 3.0, 2.5, 4.0]
    mean, error = paired(ones, others, [10] * 4)
    rows = [(a - b) / 10 for a, b in zip(ones, others, strict=True)]
    assert mean == pytest.approx(statistics.mean(rows))
    assert error == pytest.approx(statistics.stdev(rows) / 2)
    assert paired(ones[:1], others[:1], [10]) == (pytest.approx(0.05), None)
    drawn = list(itertools.product(range(3), repeat=3))  # all samples of three of three unequal rows
    ones, others, tokens = [3.0, 9.0, 5.0], [1.0, 5.0, 4.0], [8, 20, 12]
    means = [sum(ones[i] - others[i] for i in s) / sum(tokens[i] for i in s) for s in drawn]
    errors = [paired([ones[i] for i in s], [others[i] for i in s], [tokens[i] for i in s])[1] for s in drawn]
    spread = statistics.pstdev(means)
    assert statistics.mean(e**2 for e in errors if e is not None) == pytest.approx(spread**2, rel=0.3)
