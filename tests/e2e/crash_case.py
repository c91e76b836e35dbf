"""One recipe for the crash server, what an unbroken run of it gives, and what must hold after a run that was broken."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crash_server import CrashServer, Ended
from helpers import SMALL, assert_complete, content, recipe

from llmshrink.engine.workspace import WORK
from llmshrink.io.files import KILLED
from llmshrink.recipe.load import validate
from llmshrink.recipe.schema import Recipe

GPTQ = {"name": "gptq", "bits": 4, "group_size": 32}
RTN = {"name": "rtn", "bits": 4, "group_size": -1}
# Every method, and every format at least once; an export reads a folder that a run made.
CASES: dict[str, tuple[dict[str, Any] | None, str]] = {
    "gptq-dense": (GPTQ, "dense"),
    "gptq-compressed-tensors": (GPTQ, "compressed-tensors"),
    "rtn-gptq": (RTN, "gptq"),
    "rtn-awq": ({**RTN, "symmetric": False}, "awq"),
    "nf4-bnb": ({"name": "nf4", "block_size": 32}, "bnb"),
    "fp4-bnb": ({"name": "fp4", "block_size": 32}, "bnb"),
    "gptq-gguf": ({"name": "gptq", "bits": 8}, "gguf"),
    "export": (None, "compressed-tensors"),
}
KILLS = (KILLED, -signal.SIGKILL)


class Case:
    """Runs one recipe again and again, each time into a folder of its own."""

    def __init__(self, server: CrashServer, wanted: Recipe, folder: Path) -> None:
        self._server, self._folder, self._count = server, folder, 0
        self._data = json.loads(wanted.model_dump_json(exclude_unset=True))
        self.model = Path(self._data["model"]["id"])
        self._source = content(self.model)
        out = self.new_folder() / "out"
        self.unbroken = self.run(out, disk={}, memory={})
        assert self.unbroken.code == 0, self.unbroken.message
        assert not self.unbroken.events
        self.expected = content(out)
        self.seconds = self.run(out, overwrite=True).seconds
        assert content(out) == self.expected

    def new_folder(self) -> Path:
        """An empty folder for an output."""
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        return folder

    def run(self, out: Path, **how: Any) -> Ended:
        """Carry out the recipe once."""
        return self._server.run({**self._data, "output": str(out)}, **how)

    def race(self, out: Path, racers: int) -> list[Ended]:
        """Carry out the recipe several times at once."""
        return self._server.race({**self._data, "output": str(out)}, racers=racers)

    def survives(self, *codes: int, check: Callable[[Ended], None] | None = None, **how: Any) -> Ended:
        """A run that something happens to, which may end with `codes` or finish; then the same run again."""
        out = self.new_folder() / "out"
        ended = self.run(out, **how)
        assert ended.code in (0, *codes), (how, ended)
        complete = out.exists()
        assert complete or ended.code != 0, (how, ended)
        if complete:
            assert_complete(out, killed=(out / WORK).exists())
        if ended.code not in (0, *KILLS):
            if check:
                check(ended)
            left = {path.name for path in out.parent.iterdir()} - {"out", "out.partial"}
            assert not left or how.get("disk", {}).get("sticky"), (how, left)
        self.finishes(out, how)
        return ended

    def finishes(self, out: Path, how: object) -> Ended:
        """The same command again: the bytes of an unbroken run, and nothing beside them."""
        complete = out.exists()
        again = self.run(out)
        assert again.code == (7 if complete else 0), (how, again)
        assert_complete(out)
        assert content(out) == self.expected, how
        assert [path.name for path in out.parent.iterdir()] == ["out"], how
        assert content(self.model) == self._source, how
        shutil.rmtree(out)
        return again


def make_case(server: CrashServer, name: str, model: Path, text: Path, folder: Path) -> Case:
    """A case of `CASES` on a small model."""
    method, fmt = CASES[name]
    if method is not None:
        return Case(
            server, recipe(model, folder, text, method, **{**SMALL, "stage": {"format": {"name": fmt}}}), folder
        )
    source = folder.with_name(folder.name + "-source")
    sections = {**SMALL, "stage": {"format": {"name": "gptq"}}}
    made = recipe(model, source, text, {**RTN, "symmetric": True}, **sections)
    assert server.run(json.loads(made.model_dump_json(exclude_unset=True))).code == 0
    wanted = {
        "version": 1,
        "model": {"id": str(source)},
        "stages": [{"task": "export", "format": {"name": fmt}}],
        "evaluation": {"data": [], "speed": False},
        "run": {"threads": 1},
        "output": str(folder),
    }
    return Case(server, validate(wanted), folder)
