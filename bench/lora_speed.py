"""Seconds of `llmshrink lora`'s steps beside those of plain peft and Trainer: interleaved, medians.

python -m bench.lora_speed MODEL TEXT.json [STEPS] [ROUNDS]
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from llmshrink.calibration.rows import Rows
from llmshrink.checks.written import probe_tokens
from llmshrink.engine.workspace import Workspace
from llmshrink.machine import quiet_libraries
from llmshrink.model.source import open_source
from llmshrink.model.streamed import StreamedModel
from llmshrink.plan.adapting import Adapting
from llmshrink.progress import Silent
from llmshrink.recipe.load import validate
from llmshrink.train.adaptation import Adaptation
from llmshrink.train.run import train

LENGTH, BATCH, WARM = 256, 4, 2


class Clock(TrainerCallback):
    """Seconds, of the clock and of the processor, between the ends of two steps."""

    def __init__(self, steps: int) -> None:
        self._steps, self._at = steps, (0.0, 0.0)
        self.taken = (0.0, 0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.perf_counter(), time.process_time()
        if state.global_step == WARM:
            self._at = now
        if state.global_step == self._steps:
            self.taken = now[0] - self._at[0], now[1] - self._at[1]


def plain(model: str, rows: list[torch.Tensor], steps: int) -> tuple[float, float]:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=targets))
    clock = Clock(steps)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=1e-3, use_cpu=True,
            report_to="none", save_strategy="no", logging_steps=max(1, steps // 100), disable_tqdm=True,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in rows]
        Trainer(adapted, arguments, train_dataset=data, callbacks=[clock]).train()
    return clock.taken


def ours(model: str, rows: list[torch.Tensor], steps: int) -> tuple[float, float]:
    clock = Clock(steps)

    class Clocked(Adaptation):
        def trainer(self, **given: Any) -> Any:
            given["callbacks"] = [*given["callbacks"], clock]
            return super().trainer(**given)

    settings = {"length": LENGTH, "batch": BATCH, "max_steps": steps, "hold": 0, "evaluations": 0, "rate": 1e-3}
    recipe = validate({"version": 1, "model": {"id": model}, "stages": [{"task": "lora", "train": settings}]})
    adapting = Adapting(recipe, recipe.stages[0], StreamedModel(open_source(model), torch.device("cpu")))  # type: ignore
    with tempfile.TemporaryDirectory() as folder, Workspace(Path(folder) / "out") as workspace:
        workspace.begin({}, resume=False)
        lesson = Clocked(adapting, torch.device("cpu"), steps=steps, probe=probe_tokens(adapting.model))
        train(
            lesson, adapting.steps, Rows(tuple(rows), "", ""), workspace=workspace, done=[],
            device=torch.device("cpu"), progress=Silent(),
        )  # fmt: skip
    return clock.taken


def main(model: str, text: str, steps: int = 12, rounds: int = 5) -> None:
    source = open_source(model)
    ids = [i for one in json.loads(Path(text).read_text()) for i in source.tokenizer(one)["input_ids"]]
    rows = [torch.tensor(ids[n * LENGTH : (n + 1) * LENGTH]) for n in range(steps * BATCH)]
    found: dict[str, list[tuple[float, float]]] = {"plain": [], "ours": []}
    with quiet_libraries():
        for _ in range(rounds):
            found["plain"].append(plain(model, rows, steps))
            found["ours"].append(ours(model, rows, steps))
    for place, name in enumerate(("clock", "processor")):
        one, other = (statistics.median(taken[place] for taken in found[who]) / (steps - WARM) for who in found)
        print(f"{name}: plain {one:.3f} s, llmshrink {other:.3f} s a step: {other / one - 1:+.1%}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
