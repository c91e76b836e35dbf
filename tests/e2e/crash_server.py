"""Runs recipes in processes that may be killed: started as a script, it imports everything once and forks for each job.

A job is a line of JSON on stdin; the answer, a line on stdout. The server computes nothing itself, so its children
start with no threads.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self


class Ended(NamedTuple):
    """How a child ended."""

    code: int  # exit code, or minus the number of the signal
    message: str  # of the error
    steps: int  # durable steps it took, if it ended by itself
    seconds: float


class CrashServer:
    """The client's side."""

    def __enter__(self) -> Self:
        root = Path(__file__).parents[2]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-W", "ignore", __file__]
        self._server = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait(timeout=30)

    def run(
        self,
        recipe: dict[str, Any],
        *,
        crash_at: int | None = None,
        kill_after: float | None = None,
        overwrite: bool = False,
    ) -> Ended:
        """Carry out a recipe in a child that dies at a durable step, or after some seconds, or not at all."""
        assert self._server.stdin and self._server.stdout
        job = {"recipe": recipe, "crash_at": crash_at, "kill_after": kill_after, "overwrite": overwrite}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return Ended(*json.loads(self._server.stdout.readline()))


def _serve() -> None:
    import time

    # Whatever a run imports late is imported here, once.
    import compressed_tensors  # noqa: F401
    import datasets.utils  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import llmshrink.run  # noqa: F401

    for line in sys.stdin:
        job, start = json.loads(line), time.perf_counter()
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _child(job, writer)
        os.close(writer)
        timer = threading.Timer(job["kill_after"] or 0, os.kill, (child, signal.SIGKILL))
        if job["kill_after"] is not None:
            timer.start()
        with os.fdopen(reader) as pipe:
            answer = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        timer.cancel()
        message, steps = json.loads(answer) if answer else ("", 0)
        print(json.dumps([code, message, steps, time.perf_counter() - start]), flush=True)


def _child(job: dict[str, Any], writer: int) -> None:
    if job["crash_at"] is not None:
        os.environ["LLMSHRINK_CRASH_AT"] = str(job["crash_at"])
    code, message = 1, ""
    try:
        from llmshrink import run
        from llmshrink.engine import compress
        from llmshrink.errors import LlmshrinkError
        from llmshrink.io import files
        from llmshrink.progress import Silent
        from llmshrink.recipe.load import validate
        from llmshrink.report.schema import Check

        # The foreign reader imports for seconds, and has nothing to do with files that are written half.
        run.check_reader = lambda *_: Check(name="reader", passed=True, detail="left out")
        compress.SAVE_EVERY = 0  # more durable steps, and states that are whole, torn or missing
        try:
            run.execute(validate(job["recipe"]), progress=Silent(), overwrite=job["overwrite"])
            code = 0
        except LlmshrinkError as error:
            code, message = error.exit_code, str(error)
        os.write(writer, json.dumps([message, next(files._steps) - 1]).encode())
    except BaseException as error:
        os.write(writer, json.dumps([f"{type(error).__name__}: {error}", 0]).encode())
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve()
