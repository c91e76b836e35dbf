"""Files appear complete or not at all, whatever happens while they are written."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import os
import threading
from pathlib import Path

import pytest

from llmshrink.errors import OutputError, ResourceError
from llmshrink.io import files
from llmshrink.io.files import atomic_file, copy_file, disk_faults, sha256, write_bytes, write_json


def test_what_is_written_is_read_back_with_its_hash(tmp_path: Path) -> None:
    digest = write_bytes(tmp_path / "a", b"content")
    assert (tmp_path / "a").read_bytes() == b"content"
    assert digest == sha256(tmp_path / "a") == hashlib.sha256(b"content").hexdigest()


def test_the_mode_is_what_the_umask_asks_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_an_error_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"old")
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "a") as file:
        file.write(b"new")
        raise RuntimeError
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_says_what_and_what_to_do(tmp_path: Path, code: int) -> None:
    with (
        pytest.raises(
            ResourceError, match=r"a cannot be written.*needs 3\.0 MiB for .*out, and .*\n.*Make room"
        ) as caught,
        disk_faults(tmp_path / "out", 3 << 20),
        atomic_file(tmp_path / "a"),
    ):
        raise OSError(code, os.strerror(code))
    assert caught.value.exit_code == 6
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EROFS, errno.EMFILE])
def test_another_fault_of_the_disk_names_the_file(tmp_path: Path, code: int) -> None:
    with (
        pytest.raises(OutputError, match=rf"{tmp_path}/a: {os.strerror(code)}\.\n") as caught,
        disk_faults(tmp_path / "out", 0),
        atomic_file(tmp_path / "a"),
    ):
        raise OSError(code, os.strerror(code))
    assert caught.value.exit_code == 7
    assert list(tmp_path.iterdir()) == []


def test_errors_that_are_not_of_the_disk_pass(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError), disk_faults(tmp_path, 0):
        raise ConnectionError("no network")


def test_a_file_that_cannot_be_read_is_named_not_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "broken")

    broken = io.BytesIO()
    broken.read = fail  # type: ignore[assignment]
    monkeypatch.setattr(Path, "open", lambda *_: broken)
    with pytest.raises(OSError, match="broken") as caught:
        copy_file(tmp_path / "source", tmp_path / "copy")
    assert caught.value.filename == str(tmp_path / "source")


def test_a_prepared_link_does_not_redirect_the_write(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / f".a.{os.getpid()}.tmp").symlink_to(victim)
    (tmp_path / "a").symlink_to(victim)
    write_bytes(tmp_path / "a", b"new")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "a").is_symlink() and (tmp_path / "a").read_bytes() == b"new"


def test_copy_takes_the_content_of_a_link(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"x" * (files.CHUNK + 5))
    (tmp_path / "snapshot").symlink_to(tmp_path / "blob")
    digest = copy_file(tmp_path / "snapshot", tmp_path / "copy")
    assert not (tmp_path / "copy").is_symlink() and digest == sha256(tmp_path / "blob") == sha256(tmp_path / "copy")


def test_json_is_readable_and_keeps_its_letters(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "Zoë"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "name": "Zoë"\n}\n'


class Died(BaseException):
    pass


@pytest.mark.parametrize("number", range(1, 5))
def test_a_process_that_dies_at_any_step_leaves_the_old_file_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    write_bytes(tmp_path / "a", b"old")
    write_bytes(tmp_path / "b", b"old")

    def die(code: int) -> None:
        assert code == files.KILLED
        raise Died

    monkeypatch.setattr(os, "_exit", die)
    monkeypatch.setattr(files, "_steps", itertools.count(1))
    monkeypatch.setenv("LLMSHRINK_CRASH_AT", str(number))
    with pytest.raises(Died):
        write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == (b"new" if number == 4 else b"old")
    write_bytes(tmp_path / "b", b"new")  # a file has four steps; later ones are not touched
    assert (tmp_path / "b").read_bytes() == b"new"


def test_steps_of_several_threads_are_all_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_steps", itertools.count(1))
    threads = [threading.Thread(target=lambda: [files.step() for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert next(files._steps) == 2001
