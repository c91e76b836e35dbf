"""Tiny random models of each family, their tokenizer, and sentences to calibrate them on."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from llmshrink.model.task import task_of

VOCABULARY = 160
# Wide weights: with the default initialisation a zeroed layer hardly moves the logits, and any comparison passes.
WIDE = 0.2


LIKE_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": WIDE,
}
"""Two blocks with grouped-query attention, widths divisible by 64; what families built like Llama share."""

# Of every family: its configuration class in transformers, and where its tiny model differs from LIKE_LLAMA.
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": 16, "head_dim": 16}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "qwen3-moe": (
        "Qwen3MoeConfig",  # four fused experts in the first block, a dense MLP in the second
        {
            "intermediate_size": 96,
            "moe_intermediate_size": 64,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [1],
        },
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 16, "tie_word_embeddings": True}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "sliding_window": 16,
            "tie_word_embeddings": True,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("Phi3Config", {}),
    "olmo2": ("Olmo2Config", {}),
    "gpt2": ("GPT2Config", {"tie_word_embeddings": True}),
    "opt": ("OPTConfig", {"ffn_dim": 128, "tie_word_embeddings": True, "init_std": WIDE}),
    "opt-projected": (
        "OPTConfig",
        {"ffn_dim": 128, "word_embed_proj_dim": 32, "tie_word_embeddings": True, "init_std": WIDE},
    ),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "falcon": ("FalconConfig", {"multi_query": True, "tie_word_embeddings": True}),
    "falcon-new": (
        "FalconConfig",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": True},
    ),
    "falcon-alibi": (
        "FalconConfig",
        {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True, "tie_word_embeddings": True},
    ),
    "bloom": ("BloomConfig", {"tie_word_embeddings": True}),
    "bert": ("BertConfig", {}),
    "bert-masked": ("BertConfig", {"architectures": ["BertForMaskedLM"], "tie_word_embeddings": True}),
    "bert-classes": ("BertConfig", {"architectures": ["BertForSequenceClassification"], "num_labels": 5}),
    "roberta": ("RobertaConfig", {"pad_token_id": 1}),
    "xlm-roberta-tokens": (
        "XLMRobertaConfig",
        {"pad_token_id": 1, "architectures": ["XLMRobertaForTokenClassification"], "num_labels": 3},
    ),
    "distilbert": ("DistilBertConfig", {"hidden_dim": 128}),
    "electra": ("ElectraConfig", {"embedding_size": 32}),
    "mpnet": ("MPNetConfig", {"pad_token_id": 1}),
    "modernbert": ("ModernBertConfig", {"pad_token_id": 1, "initializer_cutoff_factor": 3.0}),
}


def config(family: str, **more: object) -> PretrainedConfig:
    """The configuration of a family's tiny model, with the keys that its class knows."""
    name, differs = FAMILIES[family]
    return getattr(transformers, name)(**{**LIKE_LLAMA, **differs, **more})


def build_model(folder: Path, config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A seeded random model and a tokenizer, saved to `folder`; norms and biases are not trivial."""
    torch.manual_seed(7)
    task = task_of(config)
    model: PreTrainedModel = task.loader.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    (save_tokenizer if task.causal else save_word_pieces)(folder)
    return model


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of the test vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # 97 printable characters and pieces of the text below
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>"], show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>").save_pretrained(folder)


def save_word_pieces(folder: Path) -> None:
    """A WordPiece tokenizer of the test vocabulary that puts [CLS] and [SEP] around a text."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


TEXT = [
    f"The {a} {b} went to the {c} and found {n} {d}s there. It {v} them all, and then it rained."
    for n, (a, b, c, d, v) in enumerate(
        (a, b, c, d, v)
        for a in ("old", "small", "brave", "sleepy")
        for b in ("fox", "miller", "heron", "clock")
        for c in ("river", "market", "attic")
        for d in ("pebble", "lamp", "letter")
        for v in ("counted", "painted")
    )
]
