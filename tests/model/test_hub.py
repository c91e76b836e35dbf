"""Models by id, from a Hub on loopback that answers well, badly, late, or not at all."""

from __future__ import annotations

import errno
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from helpers import SMALL, SMALL_METHOD, recipe
from hub import Hub, point_here
from huggingface_hub import constants

from llmshrink import run
from llmshrink.cli import main
from llmshrink.errors import InputError, LlmshrinkError, ModelNotFoundError, ResourceError, UnsafeError
from llmshrink.job import Job
from llmshrink.model.hub import WAITS
from llmshrink.model.source import open_source
from llmshrink.progress import Silent
from llmshrink.report.schema import Check

NAME = "models/owner/name"
ID = "owner/name"
WEIGHTS = "model.safetensors"
TOKEN = "hf_" + "secret" * 5


@pytest.fixture
def model(models_folder: Callable[..., Path]) -> Path:
    return models_folder("llama")


@pytest.fixture
def files(model: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in model.iterdir()}


def same(folder: Path, files: dict[str, bytes]) -> bool:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found} == files


def refused(kind: type[LlmshrinkError], code: int, *words: str, revision: str | None = None, name: str = ID) -> str:
    """The message with which an id is refused."""
    with pytest.raises(kind) as caught:
        _ = open_source(name, revision).hashes
    assert caught.value.exit_code == code
    text = str(caught.value)
    assert all(word in text for word in words), text
    return text


def test_a_branch_is_resolved_once_to_its_commit(hub: Hub, model: Path, files: dict[str, bytes]) -> None:
    repository = hub.add(NAME, model, branches=("main", "some/branch"))
    source = open_source(ID, "some/branch")
    assert source.commit == repository.commit and same(source.folder, files)
    assert len(hub.lines("/revision/")) == 1 and len(hub.lines("/tree/")) == 1
    assert all(repository.commit in line for line in hub.lines("/(resolve|tree)/"))


def test_a_branch_that_moved_is_followed_and_a_commit_stays(hub: Hub, files: dict[str, bytes]) -> None:
    old = hub.add(NAME, files).commit
    assert open_source(ID).commit == old
    new = hub.add(NAME, {**files, "LICENSE": b"other"}).commit
    assert open_source(ID).commit == new != old
    before = len(hub.requests)
    assert open_source(ID, old).commit == old and len(hub.requests) == before


def test_only_wanted_files_are_fetched(hub: Hub, files: dict[str, bytes]) -> None:
    wanted = {**files, "LICENSE": b"free", "NOTICE": b"note", "USE_POLICY.md": b"be good", "README.md": b"card"}
    wanted["1_Pooling/config.json"] = b"{}"
    unwanted = [
        *("pytorch_model.bin", "model.pt", "modeling_own.py", "model.gguf", "model.onnx", "picture.png"),
        *("consolidated.safetensors", "model.fp16.safetensors", "adapter_model.safetensors", "original/params.json"),
        *("original/consolidated.00.pth", "onnx/config.json", "fp16/model.safetensors"),
    ]
    hub.add(NAME, {**wanted, **dict.fromkeys(unwanted, b"x")})
    assert same(open_source(ID).folder, wanted)
    assert hub.fetched() == set(wanted)


@pytest.mark.parametrize("cut", [0, 1000, 70_000])
def test_a_dropped_connection_goes_on_where_it_broke(
    hub: Hub, model: Path, files: dict[str, bytes], waits: list[float], cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)  # bytes that are written, and kept, at once
    hub.add(NAME, model)
    hub.fail("GET /cdn/", cut=cut)
    source = open_source(ID)
    assert same(source.folder, files) and source.hashes
    asked = [request.range for request in hub.requests if request.line.startswith("GET /cdn/")]
    assert asked == [None, f"bytes={cut}-" if cut else None] and waits


def test_a_connection_reset_is_told_and_the_next_run_goes_on(hub: Hub, model: Path, files: dict[str, bytes]) -> None:
    hub.add(NAME, model)
    hub.fail("GET /cdn/", cut=1000, reset=True)
    refused(ModelNotFoundError, 4, "broke off", "run again")
    hub.requests.clear()
    assert same(open_source(ID).folder, files)
    assert hub.fetched() == {WEIGHTS}


@pytest.mark.parametrize("part", ["GET /cdn/", "config.json"])
def test_a_short_body_is_never_a_model(
    hub: Hub, model: Path, files: dict[str, bytes], part: str, waits: list[float]
) -> None:
    hub.add(NAME, model)
    hub.fail(f"GET /{ID}" if part == "config.json" else part, short=7)
    refused(InputError, 8, ID, "not as long", "Run again")
    assert same(open_source(ID).folder, files)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json"])
def test_other_bytes_than_the_commit_lists_are_refused(
    hub: Hub, files: dict[str, bytes], tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    other = files[name].replace(b"\n", b" ") if name != WEIGHTS else files[name][:-1] + b"\x01"
    assert len(other) == len(files[name]) and other != files[name]
    repository = hub.add(NAME, files, served={name: other})
    text = refused(InputError, 8, f"{name} is damaged", "Delete")
    with pytest.raises(InputError, match="is damaged"):
        run.execute(recipe(Path(ID), tmp_path / "out", text_file, SMALL_METHOD, **SMALL), progress=Silent())
    assert not (tmp_path / "out").exists()
    measured: list[object] = []
    monkeypatch.setattr("llmshrink.job.measure_models", lambda *arguments: measured.append(arguments))
    assert main(["eval", ID, "--evaluation", str(text_file), "--length", "16"]) == 8 and not measured
    repository.served.clear()
    for path in text.split("Delete ")[1].split(", and run")[0].split(" and "):
        Path(path).unlink()
    assert open_source(ID).hashes


def test_the_cache_that_repositories_share_is_read(hub: Hub, model: Path, files: dict[str, bytes]) -> None:
    """The Hub's client keeps what came by Xet in one place for all repositories, named by another hash."""
    hub.add(NAME, model)
    link = open_source(ID).folder / WEIGHTS
    blob, shared = link.resolve(), link.parents[3] / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(shared)
    source = open_source(ID)
    assert source.hashes[WEIGHTS] == blob.name and source.checkpoint.files == [WEIGHTS]
    shared.write_bytes(files[WEIGHTS][:-1] + b"\x01")
    refused(InputError, 8, "is damaged")


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("part", ["/revision/", "/tree/", "HEAD /owner/name/resolve/{}/config.json", "GET /cdn/"])
def test_a_busy_hub_is_asked_again_after_longer_and_longer_waits(
    hub: Hub, model: Path, files: dict[str, bytes], waits: list[float], status: int, part: str
) -> None:
    commit = hub.add(NAME, model).commit
    hub.fail(part.format(commit), status=status, times=3)
    assert same(open_source(ID).folder, files)
    assert len(waits) >= 2 and waits == sorted(waits)


def test_a_hub_that_stays_busy_is_told(hub: Hub, model: Path, waits: list[float]) -> None:
    hub.add(NAME, model)
    hub.fail("/revision/", status=503, times=1000)
    refused(ModelNotFoundError, 4, ID, "HTTP 503", "again later")
    assert waits == list(WAITS)


def test_a_gated_model(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, model, gated=True)
    refused(ModelNotFoundError, 4, ID, "gated", "Ask for access", "hf auth login")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    refused(ModelNotFoundError, 4, ID, "gated", "Ask for access")


def test_a_private_model_needs_its_token(
    hub: Hub, model: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, model, token=TOKEN)
    refused(ModelNotFoundError, 4, ID, "private", "hf auth login", "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert same(open_source(ID).folder, files)
    assert {r.token for r in hub.requests if r.host == "localhost"} == {None}  # the other host is not told


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_is_not_accepted(hub: Hub, model: Path, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, model)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.fail("/revision/", status=status)
    assert TOKEN not in refused(ModelNotFoundError, 4, ID, f"HTTP {status}", "hf auth login", "HF_TOKEN")


def test_a_missing_revision(hub: Hub, model: Path) -> None:
    hub.add(NAME, model)
    refused(ModelNotFoundError, 4, ID, "'v9'", "--revision", revision="v9")


@pytest.mark.parametrize("name", ["owner/nmae", "nobody", "-owner/name", "owner/name.git", "a" * 97])
def test_a_name_that_is_none(hub: Hub, name: str) -> None:
    refused(ModelNotFoundError, 4, name, "Check the name", name=name)


@pytest.mark.parametrize("name", ["a/b/c", "owner/na me", "../up", "https://hf.co/owner/name"])
def test_a_name_that_cannot_be_one_is_not_asked_for(hub: Hub, name: str) -> None:
    refused(ModelNotFoundError, 4, name, "owner/name", name=name)
    assert not hub.requests


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub() as gone:
        pass
    point_here(monkeypatch, gone.url, tmp_path / "home")
    refused(ModelNotFoundError, 4, ID, gone.url, "could not be reached", "network")


def test_a_full_disk(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    refused(ResourceError, 6, "no room", "HF_HOME")


def test_pickled_weights_are_refused(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    files["pytorch_model.bin"] = files.pop(WEIGHTS)
    hub.add(NAME, files)
    refused(UnsafeError, 5, ID, "pytorch_model.bin", "pickle is not read")
    assert "pytorch_model.bin" not in hub.fetched()
    folder = tmp_path / "local"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    refused(UnsafeError, 5, str(folder), "pytorch_model.bin", "pickle is not read", name=str(folder))


def no_sockets(patch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> None:
        raise AssertionError("a socket was opened")

    for name in ("connect", "connect_ex", "sendto", "bind"):
        patch.setattr(socket.socket, name, connect)


def test_a_warm_cache_is_enough_offline(
    hub: Hub, model: Path, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add(NAME, model).commit
    open_source(ID)
    point_here(monkeypatch, hub.url, tmp_path / "home", offline=True)
    no_sockets(monkeypatch)
    source = open_source(ID)
    assert source.commit == commit and same(source.folder, files) and source.tokenizer and source.config
    refused(ModelNotFoundError, 4, "other/name", "HF_HUB_OFFLINE", name="other/name")
    (source.folder / WEIGHTS).unlink()
    refused(ModelNotFoundError, 4, ID, "has not all of", "HF_HUB_OFFLINE")


def test_a_run_opens_no_socket_once_it_compresses(
    hub: Hub,
    model: Path,
    tmp_path: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commit = hub.add(NAME, model).commit
    hub.add("datasets/owner/texts", {"test.jsonl": json.dumps({"text": "The fox counted lamps. " * 200}).encode()})
    compress = Job._compress
    seen: list[int] = []

    def compress_alone(self: Job, *arguments: object) -> object:
        seen.append(len(hub.requests))
        no_sockets(monkeypatch)
        return compress(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Job, "_compress", compress_alone)
    monkeypatch.setattr("llmshrink.job.check_reader", lambda *_: Check(name="reader", passed=True, detail="left out"))
    small = {**SMALL, "evaluation": {"data": ["owner/texts"], "rows": 2, "length": 16}}
    report = run.execute(recipe(Path(ID), tmp_path / "out", text_file, SMALL_METHOD, **small), progress=Silent())
    assert seen == [len(hub.requests)] and report.model.commit == commit and report.model.source == "hub"


def test_the_token_is_sent_and_never_shown(
    hub: Hub,
    model: Path,
    tmp_path: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    hub.add(NAME, model, token=TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("llmshrink.job.check_reader", lambda *_: Check(name="reader", passed=True, detail="left out"))
    settings = ["--calibration", text_file, "--samples", "4", "--length", "16", "--set", "evaluation.data=[]"]
    base = ["quantize", ID, "--verbose", "--group-size", "32", "--set", "evaluation.speed=false", *settings]
    out = tmp_path / "out"
    assert main([str(a) for a in [*base, "--output", out]]) == 0
    assert TOKEN in {request.token for request in hub.requests}
    hub.fail("/revision/", status=403)
    shutil.rmtree(tmp_path / "home")
    assert main([str(a) for a in [*base, "--output", tmp_path / "two"]]) == 4
    said = capfd.readouterr()
    assert TOKEN not in said.out + said.err and "Traceback" in said.err  # --verbose shows all there is
    written = [p for folder in (out, tmp_path / "home") if folder.exists() for p in folder.rglob("*") if p.is_file()]
    assert written and not any(TOKEN.encode() in p.read_bytes() for p in written)


@pytest.mark.parametrize("end", ["\x0cend", "\u00e9", " end"])
def test_a_token_that_cannot_be_sent_is_not_quoted(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], end: str
) -> None:
    """The HTTP client quotes a header that it refuses to send."""
    monkeypatch.setenv("HF_TOKEN", TOKEN + end)
    assert main(["quantize", ID, "--plan", "--verbose"]) == 4
    output = str(tmp_path / "out")
    assert main(["quantize", "--calibration", "owner/texts", "--output", output, "--verbose"]) == 4
    said = capfd.readouterr()
    assert TOKEN not in said.out + said.err and said.err.count("Correct HF_TOKEN") >= 2 and not hub.requests


@pytest.mark.slow  # two starts of python; all else of this file runs in this process
def test_the_command_in_processes_of_its_own(hub: Hub, model: Path, tmp_path: Path, text_file: Path) -> None:
    """What HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean where nothing is patched."""
    commit = hub.add(NAME, model, token=TOKEN).commit

    def call(*arguments: object, **more: str) -> str:
        command = [sys.executable, "-m", "llmshrink", "quantize", ID, "--group-size", "32", *map(str, arguments)]
        environment = hub.environment(tmp_path / "own", HF_TOKEN=TOKEN, **more)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and TOKEN not in done.stdout + done.stderr, done.stderr
        return done.stdout

    assert json.loads(call("--plan", "--json")) and hub.fetched()
    hub.requests.clear()
    settings = ["--calibration", text_file, "--samples", "4", "--length", "16", "--set", "evaluation.speed=false"]
    out = tmp_path / "out"
    call(*settings, "--set", "evaluation.data=[]", "--output", out, HF_HUB_OFFLINE="1")
    assert json.loads((out / "report.json").read_text())["model"]["commit"] == commit and not hub.requests
