"""Faults for a process that is there for nothing else: the n-th call of one kind fails, once or from then on.

File system: an audit hook sees every open, rename, removal and folder that Python makes, and may raise in its place;
writes and syncs raise no audit event and are wrapped. Only paths below one folder count. Memory: a mode of torch's
dispatcher sees every operation of its thread.
"""

from __future__ import annotations

import errno
import os
import sys
from collections import Counter
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmshrink.io.safetensors import Checkpoint

KINDS = {
    "open": "open",
    "os.rename": "rename",
    "os.remove": "unlink",
    "os.rmdir": "rmtree",
    "os.mkdir": "mkdir",
    "os.scandir": "list",
}
DISK = ("write", "fsync", *KINDS.values())
ERRNOS = ("ENOSPC", "EIO", "EACCES", "EROFS")
OUT_OF_MEMORY = {
    "device": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "host": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 2147483648"),
    "python": MemoryError,
}


MAPPING = Checkpoint.get.__code__


class Disk:
    """Counts what is done below `folder` by kind; call number `at` of `kind` raises, all later ones too if `sticky`.

    A write that fails leaves half of its bytes behind.
    """

    def __init__(
        self, folder: Path, kind: str | None = None, at: int = 0, error: str = "EIO", sticky: bool = False
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._folder, self._kind, self._at, self._sticky = str(folder), kind, at, sticky
        self._errno = getattr(errno, error)

    def install(self) -> None:
        """Cannot be undone."""
        from llmshrink.engine import workspace
        from llmshrink.io.files import HashingWriter

        sys.addaudithook(self._audit)
        fsync, write, append = os.fsync, HashingWriter.write, workspace.Workspace.append

        def failing_fsync(handle: int) -> None:
            if self._fails("fsync", _path_of(handle)):
                raise OSError(self._errno, os.strerror(self._errno))
            fsync(handle)

        def failing_write(writer: HashingWriter, data: bytes | memoryview) -> None:
            if self._fails("write", str(writer._path)):
                writer._raw.write(data[: len(data) // 2])
                raise OSError(self._errno, os.strerror(self._errno), str(writer._path))
            write(writer, data)

        def failing_append(work: workspace.Workspace, entry: dict[str, Any]) -> None:
            if self._fails("write", str(work.work)):
                with (work.work / "journal").open("ab") as file:
                    file.write(workspace.sealed(entry)[:90])
                raise OSError(self._errno, os.strerror(self._errno), str(work.work / "journal"))
            append(work, entry)

        os.fsync = failing_fsync
        HashingWriter.write = failing_write  # type: ignore[method-assign]
        workspace.Workspace.append = failing_append  # type: ignore[method-assign]

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in KINDS or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path = os.fsdecode(arguments[0])
        if event in ("os.remove", "os.rmdir") and not Path(path).is_absolute():  # of rmtree, relative to an open folder
            path = _path_of(arguments[1]) + "/" + path
        if self._fails(KINDS[event], path):
            raise OSError(self._errno, os.strerror(self._errno), path)

    def _fails(self, kind: str, path: str) -> bool:
        if not str(Path(path).absolute()).startswith(self._folder):
            return False
        self.counts[kind] += 1
        number = self.counts[kind]
        return kind == self._kind and (number == self._at or (self._sticky and number > self._at))


def _path_of(handle: int) -> str:
    return str(Path(f"/proc/self/fd/{handle}").readlink()) if handle >= 0 else str(Path.cwd())


class Memory(TorchDispatchMode):
    """Counts operations of this thread; number `at` raises an error of `kind`, all later ones too if `sticky`."""

    def __init__(self, kind: str | None = None, at: int = 0, sticky: bool = False) -> None:
        super().__init__()
        self.count = 0
        self._kind, self._at, self._sticky = kind, at, sticky

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _called_by(MAPPING):  # nothing is allocated there, and torch swallows the error
            return function(*args, **(kwargs or {}))
        self.count += 1
        if self._kind and (self.count == self._at or (self._sticky and self.count > self._at)):
            raise OUT_OF_MEMORY[self._kind]()
        return function(*args, **(kwargs or {}))


def _called_by(code: CodeType) -> bool:
    """Whether the operation was asked for there, with nothing but torch's own wrappers between."""
    frame = sys._getframe(2)
    while "torch" in frame.f_globals["__name__"].split(".")[:1] and frame.f_back:
        frame = frame.f_back
    return frame.f_code is code
