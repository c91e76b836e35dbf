"""The folder a run works in, `OUT.partial/`: locked, journaled, and renamed to `OUT/` when everything is there.

`journal` gets one line per finished block, written after the files it names are on disk: the line's own SHA-256, then
a JSON object with those of the files. A run that starts again trusts exactly the lines that are whole and whose files
are too, up to the first that is not; it says what was lost, and removes every other file. The identity of a run
(recipe, model, text, versions, device, threads) is its first line: another identity is refused with the difference,
because mixing two runs would give a checkpoint that neither describes.

The lock is on a file that its holder removes before it lets go. Whoever locks a file that was removed meanwhile holds
nothing: filelock looks at the link count and tries again.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Container
from contextlib import suppress
from copy import copy
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from llmshrink.errors import OutputError, UnsafeError
from llmshrink.forms import Event
from llmshrink.io.files import has_hash, naming, sealed, sha256, step, sync_folder, unsealed, write_bytes, write_json

WORK = ".work"  # inside OUT.partial: journal, calibration rows and hidden states, removed when the rename is done
MANIFEST = "llmshrink-manifest.json"


class Workspace:
    """Holds the lock on one output for as long as it is open.

    Attributes:
        events: What `begin` found lost of an earlier run.
    """

    def __init__(self, output: Path, *, overwrite: bool = False) -> None:
        self.output = output.resolve()
        here = {*(Path.cwd(), *Path.cwd().parents), *(Path.home(), *Path.home().parents)}
        if self.output in here:
            raise OutputError(f"{self.output} cannot be an output folder.", hint="Name a new folder with --output.")
        self.folder = self.output.with_name(self.output.name + ".partial")
        self.work = self.folder / WORK
        self._replaced = self.output.with_name(f".{self.output.name}.replaced")
        self.events: list[Event] = []
        self._overwrite = overwrite
        self._journal, self._part = self.work / "journal", dict[str, str]()
        self._lock = FileLock(self.output.with_name(f".{self.output.name}.lock"))
        self._holder = self.output.with_name(f".{self.output.name}.lock.json")

    def __enter__(self) -> Self:
        self._refuse_links()
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            with naming(self.output):
                self._lock.acquire(timeout=0)
        except Timeout:
            raise OutputError(
                f"{self.output} is being written by another run{self._who()}.",
                hint="Wait for it, or choose another --output.",
            ) from None
        try:
            self._refuse_strangers()
            self._mend()
            self._check_free()
            # Only a courtesy to whoever finds the lock held: it need not survive a power cut.
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": int(time.time())}
            self._holder.unlink(missing_ok=True)  # of a dead run
            with naming(self._holder), self._holder.open("x", encoding="utf-8") as file:
                json.dump(holder, file)
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._mend()
        finally:
            self._release()

    def _release(self) -> None:
        with suppress(OSError):  # a file of the lock that stays keeps nobody out
            self._holder.unlink(missing_ok=True)
            Path(self._lock.lock_file).unlink(missing_ok=True)  # before the release: nobody else may hold it then
        self._lock.release()

    def _mend(self) -> None:
        """End a commit, finished or not: the replaced output goes if the new one is there, and comes back if not."""
        if self._replaced.is_dir():
            if (self._replaced / MANIFEST).exists() and not self.output.exists():
                self._replaced.rename(self.output)
            else:
                (self._replaced / MANIFEST).unlink(missing_ok=True)  # first: half of an output must not come back
                shutil.rmtree(self._replaced)
        if (self.output / MANIFEST).is_file() and (self.output / WORK).is_dir():
            shutil.rmtree(self.output / WORK)

    def _refuse_links(self) -> None:
        """Links in the places of a run's own files would have it write, or delete, where they point to."""
        own = [self.folder, self._replaced, self._holder, Path(self._lock.lock_file), self.output / WORK]
        for top, folders, files in os.walk(self.folder):
            own += [Path(top, name) for name in (*folders, *files)]
        if links := [path for path in own if path.is_symlink()]:
            raise UnsafeError(
                f"{links[0]} is a link, and no run makes one there: nothing is written through it.",
                hint="Look who put it there and remove it, or choose another --output.",
            )

    def _refuse_strangers(self) -> None:
        """Never replace or empty a folder that llmshrink did not make."""
        for folder, mark in ((self.output, MANIFEST), (self.folder, WORK)):
            empty = folder.is_dir() and not any(folder.iterdir())
            if folder.exists() and not empty and not (folder / mark).exists() and (self._overwrite or mark == WORK):
                raise OutputError(
                    f"{folder} is there already and was not made by llmshrink: it is left as it is.",
                    hint="Move it away, or choose another --output.",
                )

    def _who(self) -> str:
        try:
            holder = json.loads(self._holder.read_bytes()) if self._holder.is_file() else {}
            return f" (process {holder['pid']} on {holder['host']})"
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def _check_free(self) -> None:
        if self.output.exists() and not self._overwrite:
            raise OutputError(f"{self.output} exists already.", hint="Choose another --output, or give --overwrite.")

    # --- the journal

    def begin(
        self, identity: dict[str, Any], *, resume: bool, folders: Container[str] = (), made: Container[str] = ()
    ) -> list[dict[str, Any]]:
        """Make the folder ready; returns the entries of an earlier run of the same identity that still hold.

        `folders` in the folder of work stay for a run that goes on: whoever made them knows what in them is whole.
        Those that are `made` are this run's own, and stay in any case.

        Raises:
            OutputError: an unfinished run of another identity lies there.
        """
        found = self._read() if resume else []
        lines = list(takewhile(_is_entry, map(unsealed, found)))
        if lines and (difference := _difference(lines[0].get("identity", {}), identity)):
            raise OutputError(
                f"{self.folder} holds an unfinished run that differs:\n" + "\n".join(f"  - {d}" for d in difference),
                hint="Give the same recipe again to go on, --no-resume to start anew, or another --output.",
            )
        held = list(takewhile(lambda entry: "files" in entry and self.holds(entry["files"]), lines[1:]))
        if resume:
            self._tell_lost(found, lines, held)
        self._sweep(held, folders, made, resume=bool(lines))
        write_bytes(self._journal, b"".join(sealed(line) + b"\n" for line in [{"identity": identity}, *held]))
        sync_folder(self.folder)
        sync_folder(self.folder.parent)
        return held

    def _tell_lost(self, found: list[bytes], lines: list[dict[str, Any]], held: list[dict[str, Any]]) -> None:
        """An event where an earlier run had finished more than is held: files change only by damage."""
        lost = max(len(found) - 1, 0) - len(held)
        written = self.folder.is_dir() and any(path.name != WORK for path in self.folder.iterdir())
        if lost > 0 or (not lines and written):
            entry = lines[len(held) + 1] if len(held) + 1 < len(lines) else {}
            path = self._spoiled(entry.get("files", {})) or self._journal
            again = f"{lost} finished steps are done again" if lines else "the run begins anew"
            self.events.append(Event("work_lost", f"{path} is damaged or gone: {again}"))

    def _sweep(
        self, held: list[dict[str, Any]], folders: Container[str], made: Container[str], *, resume: bool
    ) -> None:
        """Make the folder, and remove from it what the journal does not vouch for: it must not get into this run."""
        self.work.mkdir(parents=True, exist_ok=True)
        kept = {WORK, *(name for entry in held for name in entry["files"])}
        strays = [path for path in self.folder.iterdir() if path.name not in kept]
        for path in self.work.iterdir():
            if path.name in made:
                continue
            known = path.name in folders if path.is_dir() else path.suffix != ".tmp"
            if not known or not (resume or path == self._journal):
                strays.append(path)
        for path in strays:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def append(self, entry: dict[str, Any]) -> None:
        """Add one entry; its `files` {path below the folder: SHA-256} must be on disk already."""
        with naming(self._journal), self._journal.open("ab") as file:
            step()
            file.write(sealed({**entry, **self._part}) + b"\n")
            file.flush()
            step()
            os.fsync(file.fileno())
        step()

    def part(self, name: str) -> Workspace:
        """The same for a part of the run, which has a folder of its own below that of work; its entries name it."""
        found = copy(self)
        found.work, found._part = self.work / name, {"part": name}
        return found

    def _read(self) -> list[bytes]:
        """The lines of the journal, whole or not; the last may be cut short."""
        return self._journal.read_bytes().removesuffix(b"\n").split(b"\n") if self._journal.is_file() else []

    def below(self, path: Path) -> str:
        """The name of a file in the journal: its path below the folder."""
        return path.relative_to(self.folder).as_posix()

    def holds(self, files: dict[str, str]) -> bool:
        """Whether files {path below the folder: SHA-256} are there and whole."""
        return self._spoiled(files) is None

    def _spoiled(self, files: dict[str, str]) -> Path | None:
        """The first of the files that is not there or not whole."""
        paths = ((self.folder / name, digest) for name, digest in files.items())
        return next((path for path, digest in paths if not has_hash(path, digest)), None)

    # --- the end

    def commit(self) -> None:
        """Write the manifest and rename the folder to its final name; from here on the output is complete."""
        write_manifest(self.folder)
        self._refuse_strangers()
        self._check_free()
        step()
        if self.output.exists():
            self.output.rename(self._replaced)
            step()
        self.folder.rename(self.output)
        step()
        sync_folder(self.output.parent)
        shutil.rmtree(self.output / WORK)  # last: until the rename it is what a resume needs
        step()


def whole(folder: Path) -> bool:
    """Whether a finished output has all its files as they were written."""
    try:
        listed = json.loads((folder / MANIFEST).read_bytes())["files"]
        return all(has_hash(folder / name, entry["sha256"]) for name, entry in listed.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_entry(line: Any) -> bool:
    return isinstance(line, dict) and isinstance(line.get("files", {}), dict)


def write_manifest(folder: Path) -> None:
    """List every file with its size and SHA-256 in `llmshrink-manifest.json`."""

    def refuse(error: OSError) -> None:  # `rglob` would pass over a folder that cannot be listed
        raise error

    found = (Path(top) / name for top, _, names in os.walk(folder, onerror=refuse) for name in names)
    files = sorted(path for path in found if path.name != MANIFEST and folder / WORK not in path.parents)
    entries = {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
    write_json(folder / MANIFEST, {"version": 1, "files": entries})


def _difference(old: Any, new: Any, path: str = "") -> list[str]:
    """Lines `path: old -> new` for every leaf that differs."""
    if isinstance(old, list) and isinstance(new, list):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{path}: {old!r} -> {new!r}"]
    found = []
    for key in sorted(old.keys() | new.keys()):
        found += _difference(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    return found
