"""Models as transformers alone loads them: started as a script, a process without llmshrink that is asked often.

A question is a folder and a file on a line of stdin; the answer, a line of stdout, is empty or says what went wrong.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


class Plain:
    """The client's side."""

    def __enter__(self) -> Self:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-I", __file__]  # isolated: nothing of what the tests can import
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate(timeout=30)

    def logits(self, folder: Path) -> Tensor:
        """What the model in a folder says of the rows that `helpers.logits` asks for; it generates too.

        Raises:
            RuntimeError: with its traceback, where it does not load whole.
        """
        assert self._process.stdin and self._process.stdout
        file = folder.with_name(f"{folder.name}-logits.pt")
        self._process.stdin.write(json.dumps([str(folder), str(file)]) + "\n")
        self._process.stdin.flush()
        if wrong := json.loads(self._process.stdout.readline()):
            raise RuntimeError(wrong)
        found: Tensor = torch.load(file, weights_only=True)
        return found


def _answer(folder: str, file: str) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids = torch.randint(0, 160, (3, 32), generator=torch.Generator().manual_seed(11))
    with torch.no_grad():
        torch.save(model(ids).logits, file)
    assert model.generate(ids[:1], max_new_tokens=4, do_sample=False).shape == (1, 36)
    assert "llmshrink" not in sys.modules


def _serve() -> None:
    for line in sys.stdin:
        wrong = ""
        try:
            _answer(*json.loads(line))
        except Exception:
            wrong = traceback.format_exc()
        print(json.dumps(wrong), flush=True)


if __name__ == "__main__":
    _serve()
