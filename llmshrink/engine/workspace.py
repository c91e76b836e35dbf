"""The folder a run works in, `OUT.partial/`: locked, journaled, and renamed to `OUT/` when everything is there.

`journal.jsonl` gets one line per finished block, written after the files it names are on disk; the line holds their
SHA-256. A run that starts again trusts exactly the lines whose files still have these hashes, up to the first that
does not. The identity of a run (recipe, model, text, versions, device, threads) is its first line: another identity is
refused with the difference, because mixing two runs would give a checkpoint that neither describes.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from llmshrink.errors import OutputError
from llmshrink.io.files import sha256, sync_folder, write_json

WORK = ".work"  # inside OUT.partial: journal and hidden states, removed before the rename
MANIFEST = "llmshrink-manifest.json"


class Workspace:
    """Holds the lock on one output for as long as it is open."""

    def __init__(self, output: Path, *, overwrite: bool = False) -> None:
        self.output = output.absolute()
        self.folder = self.output.with_name(self.output.name + ".partial")
        self.work = self.folder / WORK
        self._overwrite = overwrite
        self._lock = FileLock(self.output.with_name(f".{self.output.name}.lock"))
        self._holder = self.output.with_name(f".{self.output.name}.lock.json")

    def __enter__(self) -> Self:
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise OutputError(
                f"{self.output} is being written by another run{self._who()}.",
                hint="Wait for it, or choose another --output.",
            ) from None
        except OSError as error:
            raise OutputError(f"{self.output} cannot be written: {error.strerror or error}.") from error
        try:
            self._check_free()
            write_json(self._holder, {"pid": os.getpid(), "host": socket.gethostname(), "since": int(time.time())})
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._holder.unlink(missing_ok=True)
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def _who(self) -> str:
        try:
            holder = json.loads(self._holder.read_bytes())
            return f" (process {holder['pid']} on {holder['host']})"
        except (OSError, ValueError, KeyError):
            return ""

    def _check_free(self) -> None:
        if self.output.exists() and not self._overwrite:
            raise OutputError(f"{self.output} exists already.", hint="Choose another --output, or give --overwrite.")

    # --- the journal

    def begin(self, identity: dict[str, Any], *, resume: bool) -> list[dict[str, Any]]:
        """Make the folder ready; returns the entries of an earlier run of the same identity that still hold.

        Raises:
            OutputError: an unfinished run of another identity lies there.
        """
        if self.folder.exists() and not resume:
            shutil.rmtree(self.folder)
        lines = self._read()
        if lines and (difference := _difference(lines[0].get("identity", {}), identity)):
            raise OutputError(
                f"{self.folder} holds an unfinished run that differs:\n" + "\n".join(f"  - {d}" for d in difference),
                hint="Give the same recipe again to go on, --no-resume to start anew, or another --output.",
            )
        self.work.mkdir(parents=True, exist_ok=True)
        for stale in [*self.folder.glob(".*.tmp"), *self.work.glob(".*.tmp")]:
            stale.unlink()
        held = [] if not lines else self._held(lines[1:])
        self._rewrite([{"identity": identity}, *held])
        return held

    def append(self, entry: dict[str, Any]) -> None:
        """Add one entry; its `files` {path below the folder: SHA-256} must be on disk already."""
        with self._journal.open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    @property
    def _journal(self) -> Path:
        return self.work / "journal.jsonl"

    def _read(self) -> list[dict[str, Any]]:
        """The lines that parse, up to the first that does not (a torn write)."""
        lines: list[dict[str, Any]] = []
        if not self._journal.exists():
            return lines
        for raw in self._journal.read_bytes().split(b"\n"):
            try:
                value = json.loads(raw)
            except ValueError:
                break
            lines.append(value)
        return lines

    def _held(self, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Entries in order up to the first whose output files are not what the journal says.

        Of the hidden states only the last are kept on disk, so they are checked for the last entry alone.
        """
        held: list[dict[str, Any]] = []
        for entry in entries:
            if not self._intact({k: v for k, v in entry["files"].items() if not k.startswith(WORK)}):
                break
            held.append(entry)
        while held and not self._intact(held[-1]["files"]):
            held.pop()
        return held

    def _intact(self, files: dict[str, str]) -> bool:
        return all((self.folder / n).is_file() and sha256(self.folder / n) == h for n, h in files.items())

    def _rewrite(self, entries: list[dict[str, Any]]) -> None:
        temporary = self._journal.with_suffix(".new")
        with temporary.open("wb") as file:
            file.writelines(json.dumps(entry).encode() + b"\n" for entry in entries)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._journal)
        sync_folder(self.work)

    # --- the end

    def commit(self) -> None:
        """Write the manifest and rename the folder to its final name; from here on the output is complete."""
        shutil.rmtree(self.work, ignore_errors=True)
        write_manifest(self.folder)
        self._check_free()
        old = None
        if self.output.exists():
            old = self.output.with_name(f"{self.output.name}.bak-{time.time_ns()}")
            self.output.rename(old)
        self.folder.rename(self.output)
        sync_folder(self.output.parent)
        if old is not None:
            shutil.rmtree(old)


def write_manifest(folder: Path) -> None:
    """List every file with its size and SHA-256 in `llmshrink-manifest.json`."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    entries = {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
    write_json(folder / MANIFEST, {"version": 1, "files": entries})


def _difference(old: dict[str, Any], new: dict[str, Any], path: str = "") -> list[str]:
    """Lines `path: old -> new` for every leaf that differs."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b, here = old.get(key), new.get(key), f"{path}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            found += _difference(a, b, f"{here}.")
        elif a != b:
            found.append(f"{here}: {a!r} -> {b!r}")
    return found
