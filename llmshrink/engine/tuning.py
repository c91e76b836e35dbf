"""The step of a run that tunes a model from end to end: journaled, so that a run that was stopped goes on."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmshrink.engine.hidden import Hidden
from llmshrink.engine.shards import Shards
from llmshrink.engine.tune import Point, Targets, Tuner
from llmshrink.engine.workspace import Workspace
from llmshrink.errors import InterruptedRun
from llmshrink.forms import Event
from llmshrink.io import safetensors
from llmshrink.memory import trim
from llmshrink.plan.economy import Economy
from llmshrink.plan.work import Work
from llmshrink.progress import Progress
from llmshrink.report.schema import TuneReport

SAVE_EVERY = 60.0  # seconds of learning that a run which goes on repeats at most
FILE = "tuned.safetensors"  # in the folder of work: the tensors that are written otherwise


class Tuning:
    """Tunes the finished parts of a run, or goes on with that."""

    def __init__(
        self,
        work: Work,
        workspace: Workspace,
        shards: Shards,
        hidden: Hidden,
        *,
        economy: Economy,
        seed: int,
        progress: Progress,
    ) -> None:
        """`hidden` holds the original's last states."""
        self._work, self._workspace, self._progress = work, workspace, progress
        folder = workspace.work if economy.on_disk else None
        self._events: list[Event] = []
        if len(hidden.batches) == 1:
            hidden.split([1] * len(hidden.batches[0]))  # or there is none to hold back
        if len(hidden.batches) == 1:
            message = "there is one calibration row: what was learned from it is judged by itself"
            self._events.append(Event("not_held", message))
        targets = Targets(work.model, list(hidden.batches), list(hidden.originals), economy.logits)
        self._rows = hidden.rows
        hidden.forget()
        trim()
        self._tuner = Tuner(work, shards, targets, folder, seed)
        self._seconds, self._saved = 0.0, time.perf_counter()

    def run(self, done: list[dict[str, Any]]) -> dict[str, Any]:
        """Tune; `done` are the journal's entries of it.

        Returns:
            The last entry: its files hold the tensors that changed.
        """
        assert self._work.tune is not None
        if done and "report" in done[-1]:
            return done[-1]
        self._resume(done)
        self._begun, steps = time.perf_counter(), self._work.tune.steps
        tuner, after = self._tuner, float("nan")
        while True:
            self._progress.start("tune", steps, tuner.point.step)
            for loss in tuner.run():
                self._told(f"KL {loss:.5f}")
            self._progress.finish()
            after = tuner.score()
            better = tuner.point.before is not None and after < tuner.point.before
            if better or not tuner.slower():
                break
        return self._finish(after if better else None)

    def _told(self, note: str) -> None:
        """Tell of a step, and save where it is time, or where the run ends here."""
        try:
            self._progress.advance(1, note)
        except InterruptedRun:
            self._save()
            raise
        if time.perf_counter() - self._saved >= SAVE_EVERY:
            self._save()

    def _finish(self, after: float | None) -> dict[str, Any]:
        tuner, files, events = self._tuner, {}, self._events
        assert tuner.point.before is not None
        if after is None:
            message = "scales and norms stay as they were: tuning made nothing better on the rows held back"
            events.append(Event("not_tuned", message))
        else:
            path = self._workspace.work / FILE
            files = {self._workspace.below(path): safetensors.write(path, tuner.changed())}
        steps = tuner.point.step if after is not None else 0
        report = TuneReport(
            kl_before=tuner.point.before,
            kl_after=tuner.point.before if after is None else after,
            steps=steps,
            numbers=self._work.tuned_numbers,
            tokens_held=tuner.tokens_held,
        )
        entry = {
            "tuning": asdict(tuner.point),
            "files": files,
            "events": [vars(event) for event in events],
            "report": report.model_dump(mode="json"),
            "seconds": {"tune": self._taken()},
        }
        self._workspace.append(entry)
        self._remove_older(None)
        return entry

    # --- saving

    def _save(self) -> None:
        point = self._tuner.point
        path = self._workspace.work / f"tuning-{point.attempt}-{point.step:06d}.safetensors"
        saved = {self._workspace.below(path): self._tuner.save(path)}
        entry = {"tuning": asdict(point), "files": {}, "saved": saved, "rows": self._rows, "seconds": self._taken()}
        self._workspace.append(entry)
        self._remove_older(path)
        self._saved = time.perf_counter()

    def _resume(self, done: list[dict[str, Any]]) -> None:
        """Go on from the newest point whose file is whole; without one, from the beginning."""
        whole = [e for e in done if self._workspace.holds(e["saved"])]
        fitting = (e for e in reversed(whole) if e["rows"] == self._rows)
        if (entry := next(fitting, None)) is not None:
            self._tuner.load(self._workspace.folder / next(iter(entry["saved"])), Point(**entry["tuning"]))
            self._seconds = entry["seconds"]
        elif done:
            why = "other rows would be held back" if whole else f"no file of it in {self._workspace.work} is whole"
            message = f"tuning begins anew: {why}"
            self._events.append(Event("work_lost", message))

    def _remove_older(self, kept: Path | None) -> None:
        for path in self._workspace.work.glob("tuning-*.safetensors"):
            if path != kept:
                path.unlink()

    def _taken(self) -> float:
        return self._seconds + time.perf_counter() - self._begun
