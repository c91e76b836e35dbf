"""Small tokenizers of every kind that llama.cpp has an equal for, and texts on which they would differ."""

from __future__ import annotations

import json
from pathlib import Path

from tiny import TEXT
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SIZE = 600
SPACE = "\u2581"
NASTY = [
    "",
    " ",
    "   ",
    "\n",
    "\n\n \n\t\r\n",
    "Hello world",
    "  two spaces before, and after  ",
    "It's they'LL we'Re I'M don't'",
    "1 12 123 1234 3.14159 1,000,000 x2y",
    "naïve café ÉCOLE Straße ΑΒΓ αβγ Привет мир",
    "日本語 中文 한국어 ไทย العربية हिन्दी",
    "emoji 😀👩‍👩‍👧 flags 🇩🇪 e\u0301 z\u0335",
    "tabs\tand\x0bodd\x0cspaces\u00a0here\u2003there\u200b",
    "code: def f(x):\n    return x**2  # !?\n\n\nend...",
    "a<s>b</s> <s> <unk> <|x|>tail",
    "ｆｕｌｌ ½ ² ٣ Ⅷ ③ _under_score_ --- ====",
    "\x01\x7f control",
    "The old fox went to the river and found 12 pebbles there.",
]

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SLASHES = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
PATTERNS = {
    "llama-bpe": rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",
    "dbrx": rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",
    "tekken": _CASES % ("", "") + rf"|\p{{N}}|{_SLASHES}",
    "gpt-4o": _CASES % (_ENGLISH + "?", _ENGLISH + "?") + rf"|\p{{N}}{{1,3}}|{_SLASHES}",
}
"""Of tokenizer.json files in use, by llama.cpp's name for what they do."""
BYTES = ("gpt-2", "smollm", *PATTERNS)
SENTENCEPIECE = ("llama", "llama-new", "gemma")


def save(kind: str, folder: Path) -> PreTrainedTokenizerFast:
    """Train a tokenizer, add <s>, </s> and what a user defined, and save it."""
    tokenizer = _bytes(kind) if kind in BYTES else _sentencepiece(kind)
    tokenizer.add_tokens([AddedToken("<|x|>", normalized=False)])
    if kind in ("llama-bpe", *SENTENCEPIECE):
        beginning = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[beginning])
    names = {"bos_token": "<s>", "eos_token": "</s>", **({} if kind in BYTES else {"unk_token": "<unk>"})}
    loaded = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    loaded.save_pretrained(folder)
    return loaded


def _bytes(kind: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind in ("llama-bpe", "tekken")))
    if kind in PATTERNS:
        first = [pre_tokenizers.Split(Regex(PATTERNS[kind]), "isolated")]
    else:
        first = [pre_tokenizers.Digits(individual_digits=True)] if kind == "smollm" else []
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind not in PATTERNS)
    tokenizer.decoder = decoders.ByteLevel()
    # Learned from texts that are not cut: each cut then shows, for there are tokens that would reach over it.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    _train(tokenizer, ["<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, last]) if first else last
    return tokenizer


def _train(tokenizer: Tokenizer, special: list[str], alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT + NASTY * 3, trainer)


def _sentencepiece(kind: str) -> Tokenizer:
    """As transformers converts them: a token's score is its place, and a merge every way to put it together."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", SPACE)
    trained.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    _train(trained, [], [])
    special = ["<unk>", "<s>", "</s>"]
    found: dict[str, int] = json.loads(trained.to_str())["model"]["vocab"]
    learned = {text: number for text, number in found.items() if not any(name in text for name in special)}
    pieces = [*special, *(f"<0x{n:02X}>" for n in range(256)), *sorted(learned, key=lambda text: learned[text])]
    vocab = {text: number for number, text in enumerate(pieces)}
    merges = [(t[:n], t[n:]) for t in learned for n in range(1, len(t)) if t[:n] in learned and t[n:] in learned]
    merges.sort(key=lambda pair: vocab["".join(pair)])
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    spaces = normalizers.Replace(" ", SPACE)
    if kind == "llama":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
    elif kind == "llama-new":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = spaces
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return tokenizer
