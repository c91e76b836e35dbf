"""The model's own samples as calibration text: no data and no licence needed (`data: self`).

Seeded ancestral sampling at temperature 1 from the model's distribution, from its BOS token or, where it has none,
from random first tokens (as in LLM-QAT, Liu et al. 2023, arXiv 2305.17888). Needs the whole model in memory once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GenerationConfig

from llmshrink.calibration.rows import Rows
from llmshrink.errors import ResourceError
from llmshrink.memory import available_memory
from llmshrink.model.streamed import StreamedModel
from llmshrink.progress import Progress

BATCH_TOKENS = 16_384  # rows times length generated together: bounds the cache
ROOM = 1.3  # what loading and a cache need, as a multiple of the weights


def fits(model: StreamedModel) -> bool:
    """Whether a model can be in memory as a whole, its weights decompressed."""
    return model.device.type != "cpu" or int(model.dense_bytes * ROOM) <= available_memory()


@torch.no_grad()
def sample_rows(streamed: StreamedModel, *, rows: int, length: int, seed: int, progress: Progress) -> Rows:
    """Sample `rows` rows of `length` tokens.

    Raises:
        ResourceError: the model does not fit into memory as a whole.
    """
    source, device = streamed.source, streamed.device
    if not fits(streamed):
        raise ResourceError(
            f"Sampling text from {source.id} needs its {streamed.dense_bytes / 2**30:.1f} GiB in memory at once.",
            hint="Give text instead: --calibration FILE --evaluation FILE, or dataset ids.",
        )
    model = streamed.whole()
    model.generation_config = GenerationConfig()  # its own may penalise or cut: that is not its distribution
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    bos = source.tokenizer.bos_token_id
    found: list[Tensor] = []
    progress.start("sample", rows * length)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        while len(found) < rows:
            count = min(max(1, BATCH_TOKENS // length), rows - len(found))
            first = torch.full((count, 1), bos) if bos is not None else torch.randint(0, vocabulary, (count, 1))
            # Ended rows go on: a packed row may hold more than one document.
            out = model.generate(
                first.to(device),
                attention_mask=torch.ones_like(first, device=device),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=length - 1,
                max_new_tokens=length - 1,
                eos_token_id=None,
                pad_token_id=0,
            )
            found += list(out.cpu())
            progress.advance(count * length)
    progress.finish()
    return Rows(tuple(found), "self", f"{rows} samples of the model itself, seed {seed}")
