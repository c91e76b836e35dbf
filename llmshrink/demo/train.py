"""Train the embedded model: `python -m llmshrink.demo.train --out DIR`.

Reads nothing but the story generator. Writes a byte-level BPE tokenizer, a small Llama in bfloat16 and TRAINING.json
with what was done and what came out, with the cost of rounding the weights to 8, 4, 3 and 2 bits. The model in
`demo/model` was made this way; another machine or thread count gives other last digits.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmshrink.demo.generator import EVALUATION_SEED, TRAIN_SEED, stories

BOUNDARY = "<|story|>"  # put before every story; the model predicts it after one, so it also ends generation


@dataclass(frozen=True)
class Settings:
    """How the embedded model was trained."""

    seed: int = 0  # of the weights; the text has TRAIN_SEED
    steps: int = 2400
    warmup: int = 100
    rows: int = 4  # per step
    length: int = 256  # tokens of a row
    learning_rate: float = 4e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    vocabulary: int = 1024
    tokenizer_stories: int = 5000
    evaluation_rows: int = 64


def train_tokenizer(settings: Settings) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE vocabulary from training stories; digits stay apart so that sums can be learned."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[BOUNDARY],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.islice(stories(TRAIN_SEED), settings.tokenizer_stories), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOUNDARY} $A", special_tokens=[(BOUNDARY, tokenizer.token_to_id(BOUNDARY))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOUNDARY,
        eos_token=BOUNDARY,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, settings: Settings) -> LlamaForCausalLM:
    """A fresh float32 Llama: grouped-query attention, untied head, every width a multiple of 128."""
    boundary = tokenizer.bos_token_id
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=settings.length,
        tie_word_embeddings=False,
        bos_token_id=boundary,
        eos_token_id=boundary,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=boundary, eos_token_id=boundary, pad_token_id=boundary)
    return model


def token_rows(tokenizer: PreTrainedTokenizerFast, seed: int, length: int) -> Iterator[Tensor]:
    """Yield rows [length] of token ids (int64) for ever: stories packed end to end, each after the boundary token."""
    pending: list[int] = []
    for story in stories(seed):
        pending += tokenizer(story).input_ids
        while len(pending) >= length:
            yield torch.tensor(pending[:length])
            del pending[:length]


def fit(model: LlamaForCausalLM, rows: Iterator[Tensor], settings: Settings) -> list[float]:
    """Train in place with AdamW under a linear warm-up and a cosine decay to zero; return the loss of each step."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )

    def factor(step: int) -> float:
        return min((step + 1) / settings.warmup, 0.5 * (1 + math.cos(math.pi * step / settings.steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses = []
    model.train()
    for step in range(settings.steps):
        batch = torch.stack(list(itertools.islice(rows, settings.rows)))
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 200 == 0:
            print(f"step {step:5d}  loss {losses[-1]:.4f}", flush=True)
    return losses


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, rows: Tensor) -> float:
    """Token perplexity over rows [n, length]; every token but the first of a row is predicted, in float32."""
    losses = [model(input_ids=batch, labels=batch).loss * len(batch) for batch in torch.split(rows, 16)]
    return math.exp(torch.stack(losses).sum().item() / len(rows))


@torch.no_grad()
def rounded(model: LlamaForCausalLM, bits: int, group: int = 128) -> LlamaForCausalLM:
    """A copy whose decoder linears are rounded to nearest: symmetric, one min-max scale for each group of inputs."""
    model = copy.deepcopy(model)
    top = 2 ** (bits - 1)
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            groups = module.weight.view(len(module.weight), -1, group)
            scale = groups.abs().amax(2, keepdim=True) / (top - 0.5)
            module.weight.copy_(((groups / scale).round().clamp(-top, top - 1) * scale).view_as(module.weight))
    return model


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model in bfloat16, and its tokenizer."""
    model.bfloat16().save_pretrained(folder)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    # Written by hand because transformers 5 names a class here that transformers 4 does not know.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, tokenizer and TRAINING.json")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    settings = Settings(steps=arguments.steps)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(settings.seed)
    started = time.perf_counter()

    tokenizer = train_tokenizer(settings)
    model = build_model(tokenizer, settings)
    losses = fit(model, token_rows(tokenizer, TRAIN_SEED, settings.length), settings)
    seconds = time.perf_counter() - started
    save(model, tokenizer, arguments.out)
    model = LlamaForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)

    held_out = token_rows(tokenizer, EVALUATION_SEED, settings.length)
    evaluation = torch.stack(list(itertools.islice(held_out, settings.evaluation_rows)))
    by_bits = {str(bits): round(perplexity(rounded(model, bits), evaluation), 4) for bits in (8, 4, 3, 2)}
    last = losses[-50:]
    report = {
        "settings": asdict(settings),
        "text": {"train_seed": TRAIN_SEED, "evaluation_seed": EVALUATION_SEED},
        "parameters": model.num_parameters(),
        "tokens": settings.steps * settings.rows * settings.length,
        "seconds": round(seconds),
        "threads": arguments.threads,
        "final_loss": round(sum(last) / len(last), 4),  # mean of the last 50 steps
        "perplexity": round(perplexity(model, evaluation), 4),
        "perplexity_rtn_g128": by_bits,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (arguments.out / "TRAINING.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
