"""What is kept of a teacher, against the teacher itself; made in two goes; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers import Stopping, load
from safetensors.numpy import load_file
from tiny import build_model, config

from llmshrink.calibration.rows import Rows
from llmshrink.errors import InputError, InterruptedRun, OutputError, PlanError, ResourceError
from llmshrink.io.files import sha256
from llmshrink.model.source import open_source
from llmshrink.plan import cache as plan
from llmshrink.plan.cache import FACTS, Keeping, Kind, keeping
from llmshrink.progress import Silent
from llmshrink.recipe.cache import CacheSpec
from llmshrink.recipe.distill import DistillStage
from llmshrink.report.schema import TextReport
from llmshrink.train import caching
from llmshrink.train.cache import Cache, Cached, coded, meant, names, packed, unpacked
from llmshrink.train.caching import LOCK, cache_of
from llmshrink.train.data import write
from llmshrink.train.packing import Row
from llmshrink.train.sparse import drawn, likeliest

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "model"
    small = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
    build_model(folder, config("llama", vocab_size=168, **small))  # eight more than it has tokens
    return folder


@pytest.fixture(scope="module")
def rows() -> Rows:
    made = torch.Generator().manual_seed(0)
    lengths = [12, 12, 12, 9, 12, 12, 5, 12]
    return Rows(tuple(torch.randint(0, 97, (n,), generator=made) for n in lengths), "text", "text")


def asked(teacher: Path, folder: Path | None, temperature: float = 1.0, **spec: Any) -> Keeping:
    stage = {"task": "distill", "cache": {**spec, "folder": None if folder is None else str(folder)}}
    wanted = DistillStage.model_validate({**stage, "loss": {"temperature": temperature}})
    source = open_source(str(teacher))
    found = keeping(wanted, source, source)
    assert found is not None
    return found


def made(wanted: Keeping, rows: Rows, work: Path, progress: Silent | None = None) -> Cache:
    work.mkdir(exist_ok=True)
    given = [Row(row.numpy().astype(np.int32), np.ones(len(row), dtype=np.bool_), 0) for row in rows.tokens]
    told = TextReport(data=rows.data, origin=rows.origin, kind="text")
    examples = write(work / "examples", given, {}, lambda: (told, []))
    return cache_of(wanted, examples, work, CPU, progress or Silent())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("method", ["sampled", "topk"])
def test_what_is_kept_is_what_the_teacher_says(
    teacher: Path, rows: Rows, tmp_path: Path, method: str, temperature: float
) -> None:
    cache = made(asked(teacher, None, temperature, method=method, tokens=20), rows, tmp_path)
    model = load(teacher)[0]
    known = len(open_source(str(teacher)).tokenizer)
    assert cache.kind.vocabulary == known < 168
    covered = []
    for row in rows.tokens:
        with torch.no_grad():
            said = model(row[None]).logits[0, :-1, :known]
        words = cache.row(row)
        right, softened = said.log_softmax(-1), (said / temperature).log_softmax(-1)
        assert torch.allclose(words.logs, right.gather(-1, words.tokens), rtol=0.05, atol=1e-3)
        assert torch.allclose(words.at(temperature)[0], softened.gather(-1, words.tokens), rtol=0.05, atol=1e-3)
        assert all(len(set(kept)) == 20 for kept in words.tokens.tolist())
        top = softened.topk(20)
        if method == "topk":
            assert words.tokens.tolist() == top.indices.sort(-1).values.tolist()
        logs, stands = words.at(temperature)
        assert method == "topk" or torch.allclose((stands * logs.exp()).sum(-1), torch.ones(len(said)), atol=0.03)
        covered.append(softened.gather(-1, words.tokens).exp().sum(-1))
    assert cache.report().covered == pytest.approx(float(torch.cat(covered).mean()), abs=1e-3)


@pytest.mark.parametrize("vocabulary", [300, 70_000])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("method", ["sampled", "topk"])
def test_words_are_kept_in_the_bytes_that_the_plan_says(method: str, temperature: float, vocabulary: int) -> None:
    kind = Kind.of(CacheSpec.model_validate({"method": method}), temperature, vocabulary)
    teacher = 3 * torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(1))
    uniform = torch.rand(5, dtype=torch.float64)
    words = (
        drawn(teacher, kind.tokens, temperature, uniform)
        if kind.drawn
        else likeliest(teacher, kind.tokens, temperature)
    )
    tensors = packed(words, kind, torch.rand(words.logs.shape))
    assert sum(tensor.nbytes for tensor in tensors.values()) == 5 * kind.position_bytes <= 5 * 119
    assert kind.tokens >= (55 if vocabulary == 300 else 40) and kind.position_bytes > 119 - 4
    back = unpacked({name: tensors[name] for name in names(kind)}, kind)
    tokens, order = words.tokens.sort(-1)
    assert torch.equal(back.tokens, tokens) and back.rest == words.rest == (method == "topk")
    for one, other in zip(back.at(temperature), words.at(temperature), strict=True):
        assert torch.allclose(one, other.gather(-1, order), rtol=0.2, atol=2e-3)


def test_a_code_is_exact_on_average() -> None:
    logs = torch.cat([-torch.logspace(-6, 1.39, 200), torch.zeros(1), torch.tensor([-300.0, -torch.inf])])
    draws = 20_000
    dither = (torch.arange(draws) + 0.5)[:, None] / draws
    found = meant(coded(logs.expand(draws, -1), dither.expand(-1, len(logs)))).double().exp().mean(0)
    right = logs.clamp(min=-25).double().exp()
    assert ((found - right).abs() <= 2e-4 * right).all()


def test_others_can_read_it(teacher: Path, rows: Rows, tmp_path: Path) -> None:
    wanted = asked(teacher, None, tokens=20)
    cache = made(wanted, rows, tmp_path)
    (path,) = (tmp_path / "cache").glob("*.safetensors")
    found = load_file(path)
    start = sum(len(row) - 1 for row in rows.tokens[:3])
    low = (cache.kind.vocabulary // 20).bit_length() - 1
    for line, right in zip(found["tokens"][start : start + 8], cache.row(rows.tokens[3]).tokens, strict=True):
        bits = [byte >> place & 1 for byte in line.tolist() for place in range(8)]
        steps = [place for place, bit in enumerate(bits) if bit][:20]
        rest = bits[20 + (cache.kind.vocabulary - 1 >> low) + 1 :]
        digits = [sum(bit << place for place, bit in enumerate(rest[i * low : (i + 1) * low])) for i in range(20)]
        assert [(step - i << low) + digits[i] for i, step in enumerate(steps)] == right.tolist()
    report = cache.report()
    assert report.positions == found["positions"].sum() == len(found["tokens"]) == rows.count - len(rows.tokens)
    assert report.bytes == sum(p.stat().st_size for p in (path, tmp_path / "cache" / FACTS))
    assert str(tmp_path) not in (tmp_path / "cache" / FACTS).read_text()


def test_rows_are_found_in_any_order_and_behind_padding(teacher: Path, rows: Rows, tmp_path: Path) -> None:
    cache = made(asked(teacher, None, 2.0, tokens=20), rows, tmp_path)
    ids, mask = torch.zeros(3, 14, dtype=torch.long), torch.zeros(3, 14, dtype=torch.long)
    places = [(6, 0), (3, 5), (0, 2)]  # padded on the right, on the left, on both sides
    for line, (number, start) in enumerate(places):
        row = rows.tokens[number]
        ids[line, start : start + len(row)], mask[line, start : start + len(row)] = row, 1
    words = Cached(cache).look({"input_ids": ids, "attention_mask": mask})
    for line, (number, start) in enumerate(places):
        right = cache.row(rows.tokens[number])
        found = words(slice(start, start + len(right.tokens)))
        part = slice(line * len(right.tokens), (line + 1) * len(right.tokens))
        assert torch.equal(found.tokens[part], right.tokens) and torch.equal(found.logs[part], right.logs)
        assert torch.equal(found.shift[part], right.shift) and torch.equal(found.threshold[part], right.threshold)
    logs, stands = words(slice(4, 5)).at(2.0)
    assert float((stands * logs.exp())[0].sum()) == 0


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}


def test_a_killed_run_goes_on_behind_the_last_whole_shard(
    teacher: Path, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching, "SHARD", 24)  # two rows
    made(asked(teacher, tmp_path / "whole"), rows, tmp_path / "one")
    right = hashes(tmp_path / "whole")
    wanted = asked(teacher, tmp_path / "cache")
    with pytest.raises(InterruptedRun):
        made(wanted, rows, tmp_path / "two", Stopping(note="shard 3"))
    assert len(hashes(tmp_path / "cache")) == 3 and not (tmp_path / "cache" / FACTS).exists()
    damaged = tmp_path / "cache" / "00002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    shards: list[str] = []

    class Noting(Silent):
        def advance(self, amount: int, note: str = "") -> None:
            shards.extend([note] * bool(note))

    made(wanted, rows, tmp_path / "two", Noting())
    assert hashes(tmp_path / "cache") == right and len(right) == 4
    assert shards == [f"shard {n} of 4" for n in (3, 4)]
    assert {p.name for p in (tmp_path / "cache").iterdir()} == {*right, FACTS, LOCK}


def test_one_cache_is_enough(teacher: Path, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "WAIT", 0.01)
    folder = tmp_path / "cache"
    wanted = asked(teacher, folder)
    folder.mkdir()
    with FileLock(folder / LOCK), pytest.raises(InterruptedRun):
        made(wanted, rows, tmp_path / "one", Stopping(note="another run makes cache"))
    made(wanted, rows, tmp_path / "one")
    again = asked(teacher, folder)
    assert again.found is not None
    fewer = Rows(rows.tokens[::-2], "text", "text")
    made(again, fewer, tmp_path / "two", Stopping())  # it would stop at the first token through the teacher
    made(wanted, fewer, tmp_path / "three", Stopping())  # that one was planned before there was a cache


def test_what_does_not_fit_is_refused(
    teacher: Path, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, work = tmp_path / "cache", tmp_path / "work"
    made(asked(teacher, folder, tokens=20), rows, work)
    for changes, why in (
        ({"temperature": 2.0}, "its temperature is 1.0, and 2.0 is wanted"),
        ({"method": "topk"}, "its method is sampled, and topk is wanted"),
        ({"tokens": 21}, "its tokens of a position is 20, and 21 is wanted"),
    ):
        with pytest.raises(PlanError, match=why):
            asked(teacher, folder, **changes)  # type: ignore[arg-type]
    monkeypatch.setattr(plan, "tokens_hash", lambda _: "another")
    with pytest.raises(PlanError, match="its tokenizer is .* another is wanted"):
        asked(teacher, folder)
    monkeypatch.undo()
    other = Rows((rows.tokens[0], rows.tokens[1].flip(0)), "text", "text")
    with pytest.raises(InputError, match="1 of 2 rows are not in the cache .* the first of them row 1"):
        made(asked(teacher, folder), other, work)
    stranger = shutil.copytree(teacher, tmp_path / "stranger")
    (stranger / "generation_config.json").write_text("{}")
    with pytest.raises(InputError, match="words of another teacher, model"):
        made(asked(stranger, folder), rows, work)
    made(asked(teacher, tmp_path / "next", tokens=19), rows, tmp_path / "elsewhere")
    with pytest.raises(InputError, match="no longer the cache that this run began with"):
        made(asked(teacher, tmp_path / "next"), rows, work)
    with pytest.raises(InputError, match="another cache in .* meanwhile"):
        made(Keeping(**{**vars(asked(teacher, None)), "folder": folder}), rows, work)
    facts = json.loads((folder / FACTS).read_text())
    for changes, why in (
        ({"tokens": 19}, "00000.safetensors does not hold what cache.json says"),
        ({"method": "all"}, "of an unknown kind"),
        ({"vocabulary": facts["kind"]["vocabulary"] - 4}, "no sets of 20 numbers"),
        ({"vocabulary": 3}, "does not hold what"),
    ):
        copy = shutil.copytree(folder, tmp_path / "copy")
        (copy / FACTS).write_text(json.dumps({**facts, "kind": {**facts["kind"], **changes}}))
        with pytest.raises(InputError, match=why):
            Cache(copy).row(rows.tokens[0])
        shutil.rmtree(copy)
    for name, text, why in (
        ("00000.safetensors", b"x", "00000.safetensors is damaged"),
        (FACTS, b"{}", "no description of a cache"),
        (FACTS, b'{"version": 2}', "version 2"),
    ):
        copy = shutil.copytree(folder, tmp_path / "copy")
        (copy / name).write_bytes(text)
        with pytest.raises(InputError, match=why):
            made(asked(teacher, copy), rows, work)
        shutil.rmtree(copy)


def test_where_it_cannot_be_made(teacher: Path, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "SHARD", 24)
    folder = tmp_path / "cache"
    with pytest.raises(InterruptedRun):
        made(asked(teacher, folder), rows, tmp_path / "work", Stopping(note="shard 1"))
    with pytest.raises(OutputError, match="unfinished cache of another kind"):
        made(asked(teacher, folder, tokens=5), rows, tmp_path / "work")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="is there already, and it is no cache"):
        made(asked(teacher, mine), rows, tmp_path / "work")
    monkeypatch.setattr(caching, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ResourceError, match="MiB of disk, and 0.0 are free"):
        made(asked(teacher, tmp_path / "large"), rows, tmp_path / "work")
