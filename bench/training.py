"""What a step of distillation takes beside what it is made of: a step of the student, and a teacher's forward pass.

    python -m bench.training [MODEL] [--layers 6] [--rows 4] [--length 512] [--repeat 5] [--threads 2]

The student is MODEL's first layers; without MODEL both are random Llamas with a vocabulary of 32,768, whose heads weigh
more. A plain step is the loss that transformers computes itself, with all logits in memory; all three are timed in
turn, and the ratio is the median of the turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, TrainingArguments

from llmshrink.recipe.distill import LossSpec
from llmshrink.train.teachers import Online
from llmshrink.train.trainer import Distiller

RANDOM = LlamaConfig(
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=32768,
    tie_word_embeddings=True,
)


def model(name: str | None, layers: int | None = None) -> PreTrainedModel:
    """A model in float32, or its first layers."""
    torch.manual_seed(0)
    if name is None:
        found = AutoModelForCausalLM.from_config(RANDOM)
    else:
        found = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    if layers is not None:
        found.model.layers = found.model.layers[:layers]
        found.config.num_hidden_layers = layers
    return found


def stepping(learner: PreTrainedModel, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """A whole step of gradient."""
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-5)

    def step() -> None:
        learner.train()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def turns(given: argparse.Namespace, loss: LossSpec) -> list[tuple[float, ...]]:
    """Seconds of our step, a plain step of the student, and the teacher's forward pass, for each turn."""
    teacher = model(given.model).eval().requires_grad_(False)
    ours, plain = model(given.model, given.layers), model(given.model, given.layers)
    ids = torch.randint(3, teacher.config.vocab_size, (given.rows, given.length))
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(output_dir=folder, use_cpu=True, report_to="none")
        distiller = Distiller(teacher=Online(teacher), loss=loss, model=ours, args=arguments)
    counted = torch.tensor(given.rows * (given.length - 1))

    @torch.no_grad()
    def teach() -> None:
        teacher(input_ids=ids)

    steps = (
        stepping(ours, lambda: distiller.compute_loss(ours, batch, num_items_in_batch=counted)),
        stepping(plain, lambda: plain(**batch).loss),
        teach,
    )
    return [tuple(seconds(step) for step in steps) for _ in range(given.repeat + 1)][1:]


def seconds(step: Callable[[], None]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for loss in (LossSpec(temperature=1.0, alpha=1.0), LossSpec(temperature=2.0, alpha=0.5)):
        found = turns(given, loss)
        ours, plain, teach = (statistics.median(each) for each in zip(*found, strict=True))
        ratio = statistics.median(turn[0] / (turn[1] + turn[2]) for turn in found)
        print(
            f"alpha {loss.alpha}: ours {ours:.3f} s, student {plain:.3f} s, teacher {teach:.3f} s, ratio {ratio:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
