"""Runs recipes in processes that may be killed: started as a script, it imports everything once and forks for each job.

A job is a line of JSON on stdin; the answer, a line on stdout. The first job is carried out once by the server itself,
so that its children find every table of the libraries made; it computes with one thread, and leaves none behind.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

STUCK = 60.0  # seconds after which a child is ended with its traceback on stderr


class Ended(NamedTuple):
    """How a child ended."""

    code: int  # exit code, or minus the number of the signal
    message: str  # of the error
    steps: int  # durable steps it took, if it ended by itself
    counts: dict[str, int]  # calls that could have failed, by kind
    events: list[str]  # kinds of what the listener was told
    seconds: float


class CrashServer:
    """The client's side."""

    def __enter__(self) -> Self:
        here = Path(__file__).parent
        path = os.pathsep.join(map(str, (here.parents[1], here.parent, here)))
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-W", "ignore", __file__]
        pipe = subprocess.PIPE
        self._server = subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=None, text=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.communicate(timeout=30)

    def run(self, recipe: dict[str, Any], **how: Any) -> Ended:
        """Carry out a recipe in a child.

        Args:
            recipe: what to do.
            how: `overwrite`; what it dies of: `crash_at` a durable step, `kill_after` seconds; `disk` and `memory`,
                arguments of the faults of `injected`; `signals`, a list of [seconds, number]; `limits`, of
                [name in `resource`, value], where the value of RLIMIT_AS counts from what the child holds; `umask`.
        """
        return self.race(recipe, racers=1, **how)[0]

    def race(self, recipe: dict[str, Any], *, racers: int, **how: Any) -> list[Ended]:
        """The same recipe in several children that begin together."""
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write(json.dumps({"recipe": recipe, "racers": racers, **how}) + "\n")
        self._server.stdin.flush()
        return [Ended(*ended) for ended in json.loads(self._server.stdout.readline())]


def _serve() -> None:
    # Whatever a run imports late is imported here, once.
    import bitsandbytes  # noqa: F401
    import compressed_tensors  # noqa: F401
    import datasets.utils  # noqa: F401
    import injected  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    from llmshrink import job
    from llmshrink.engine import compress
    from llmshrink.formats import awq, bnb, compressed_tensors, dense, gptq  # noqa: F401, F811
    from llmshrink.methods import fp4, nf4, rtn  # noqa: F401
    from llmshrink.report.schema import Check

    # The foreign reader imports for seconds, and has nothing to do with files that are written half.
    job.check_reader = lambda *_: Check(name="reader", passed=True, detail="left out")
    os.fsync = lambda _: None  # the system outlives every child
    compress.SAVE_EVERY = 0  # more durable steps, and states that are whole, torn or missing
    warm = False
    for line in sys.stdin:
        job = json.loads(line)
        if not warm:
            _warm(job["recipe"])
            warm = True
        barrier, release = os.pipe()
        begun = [_fork(job, barrier, release) for _ in range(job.get("racers", 1))]
        os.close(barrier)
        os.close(release)  # the children start
        print(json.dumps([_ended(job, *child) for child in begun]), flush=True)


def _fork(job: dict[str, Any], barrier: int, release: int) -> tuple[int, int]:
    """A child that begins when all ends of `release` are closed, and the pipe that it answers on."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.close(release)
        os.read(barrier, 1)
        _child(job, writer)
    os.close(writer)
    return child, reader


def _ended(job: dict[str, Any], child: int, reader: int) -> tuple[Any, ...]:
    start = time.perf_counter()
    signals = [*job.get("signals", ()), *([[job["kill_after"], signal.SIGKILL]] if "kill_after" in job else ())]
    timers = [threading.Timer(after, os.kill, (child, number)) for after, number in signals]
    for timer in timers:
        timer.start()
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for timer in timers:
        timer.cancel()
    told = json.loads(answer) if answer else ("", 0, {}, [])
    return (code, *told, time.perf_counter() - start)


def _warm(recipe: dict[str, Any]) -> None:
    import tempfile

    from llmshrink import run
    from llmshrink.progress import Silent
    from llmshrink.recipe.load import validate

    with tempfile.TemporaryDirectory() as folder:
        run.execute(validate({**recipe, "output": f"{folder}/out"}), progress=Silent())


def _child(job: dict[str, Any], writer: int) -> None:
    if "crash_at" in job:
        os.environ["LLMSHRINK_CRASH_AT"] = str(job["crash_at"])
    os.umask(job.get("umask", 0o022))
    code, message, events = 1, "", []
    faulthandler.dump_traceback_later(STUCK, exit=True)
    try:
        import itertools

        from injected import Disk, Memory

        from llmshrink import run
        from llmshrink.errors import LlmshrinkError
        from llmshrink.io import files
        from llmshrink.progress import Silent
        from llmshrink.recipe.load import validate

        class Listener(Silent):
            def event(self, event: Any) -> None:
                events.append(event.kind)

        recipe, files._steps = validate(job["recipe"]), itertools.count(1)
        disk = Disk(Path(job["recipe"]["output"]).parent, **(job.get("disk") or {}))
        if "disk" in job:
            disk.install()
        for name, value in job.get("limits", ()):
            held = _held() if name == "RLIMIT_AS" else 0
            resource.setrlimit(getattr(resource, name), (held + value, resource.RLIM_INFINITY))
        memory = Memory(**(job.get("memory") or {}))
        counts = disk.counts
        try:
            with memory if "memory" in job else nullcontext():
                run.execute(recipe, progress=Listener(), overwrite=job.get("overwrite", False))
            code = 0
        except LlmshrinkError as error:
            code, message = error.exit_code, str(error)
        except KeyboardInterrupt:
            code = 130
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        counts["operations"] = memory.count
        os.write(writer, json.dumps([message, next(files._steps) - 1, counts, events]).encode())
    except BaseException as error:
        import traceback

        where = traceback.format_exc(limit=-4)
        os.write(writer, json.dumps([f"{type(error).__name__}: {error}\n{where}", 0, {}, events]).encode())
    finally:
        os._exit(code)


def _held() -> int:
    """Bytes of address space of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    _serve()
