"""Runs cases in several processes that train together: started as a script, it imports once and forks for each case.

A case is a line of JSON on stdin; the answer, a line on stdout. Where no launcher is, the first process of a case holds
the store itself.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

STUCK = 120  # seconds after which a process of a case is ended


class Ended(NamedTuple):
    """How one process of a case ended."""

    code: int  # exit code, or minus the number of the signal
    found: Any  # what the case gave back
    said: str  # on stdout and stderr


class RanksServer:
    """The client's side."""

    def __enter__(self) -> Self:
        here = Path(__file__).parent
        path = os.pathsep.join(map(str, (here.parents[1], here.parent, here)))
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        env["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the command line has it in a process that was launched
        command = [sys.executable, "-W", "ignore", __file__]
        self._server = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.communicate(timeout=30)

    def run(self, case: str, folder: Path, *, processes: int = 2, **given: Any) -> list[Ended]:
        """Run a case of `ranks_cases` in processes that know of each other.

        Args:
            case: the name of the function.
            folder: for what they say; it is made.
            processes: how many.
            given: its arguments.
        """
        assert self._server.stdin and self._server.stdout
        folder.mkdir()
        asked = {"case": case, "folder": str(folder), "processes": processes, "given": given}
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        codes = json.loads(self._server.stdout.readline())
        ended = []
        for rank, code in enumerate(codes):
            found = folder / f"found{rank}.json"
            said = (folder / f"said{rank}").read_text()
            ended.append(Ended(code, json.loads(found.read_text()) if found.exists() else None, said))
        return ended


def _serve() -> None:
    import ranks_cases
    import torch

    torch.set_num_threads(1)
    os.fsync = lambda _: None  # as in `conftest`
    for line in sys.stdin:
        asked = json.loads(line)
        case, folder, processes = getattr(ranks_cases, asked["case"]), Path(asked["folder"]), asked["processes"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(processes):
            child = os.fork()
            if not child:
                numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                os.environ.update({name: str(number) for name, number in numbers.items()})
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                _child(partial(case, **asked["given"]), folder / f"said{rank}", folder / f"found{rank}.json")
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)
    os._exit(0)  # tidying up takes seconds


def _child(case: Callable[[], tuple[int, Any]], said: Path, found: Path) -> None:
    code = 1
    try:
        signal.alarm(STUCK)
        with said.open("wb") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        code, answer = case()
        found.write_text(json.dumps(answer))
    except BaseException:  # it is told, and the process ends
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
