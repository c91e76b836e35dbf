"""A tokenizer in llama.cpp's words, so that it gives the same tokens, or a refusal.

What is translated is the tokenizer that transformers loaded, whatever files it came from: it is what the model was
calibrated and measured with. Two kinds are known: byte-level BPE, whose merges llama.cpp applies itself ("gpt2"), and
BPE of SentencePiece ("llama"), where it merges whatever two neighbours make the token with the best score. A list of
merges says the same as scores only if every way to put a token together is in it, and those of one token stand
together; that is how SentencePiece's models are written to tokenizer.json, and it is checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from llmshrink.errors import PlanError
from llmshrink.gguf.splits import Way, ways
from llmshrink.io.gguf import Value

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's llama_token_type
SPACE = "\u2581"  # what SentencePiece writes for a space
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
PREFIX = {"type": "Prepend", "prepend": SPACE}
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
Result = tuple[dict[str, Value], list[str]]


def vocabulary(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, rows: int) -> Result:
    """The entries `tokenizer.*` of the metadata, and what a user should know of them.

    Args:
        tokenizer: the model's, as transformers loaded it.
        config: says where a text ends if the tokenizer does not.
        rows: of the embedding; ids without a token are filled up to them.

    Raises:
        PlanError: llama.cpp has no tokenizer that gives the same tokens.
    """
    if not tokenizer.is_fast:
        raise PlanError(
            f"{type(tokenizer).__name__} has no tokenizer.json, from which llama.cpp's vocabulary is made.",
            hint="Load it with transformers' AutoTokenizer and save it beside the model.",
        )
    described: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    plain = not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout"))
    if model["type"] != "BPE" or not plain:
        raise PlanError(f"llama.cpp's vocabulary is made from a plain BPE tokenizer, and this is {model['type']}.")
    tokens, types = _tokens(described, rows)
    named = {name: number for name, number in _named(tokenizer, config).items() if number < rows}
    if "eos" not in named:
        raise PlanError("Neither the tokenizer nor config.json says which token ends a text (eos_token).")
    kind, notes = (_sentencepiece if model["byte_fallback"] else _bytes)(described, tokenizer, tokens, types)
    before, after = _around(described["post_processor"], {name: named.get(name) for name in ("bos", "eos")})
    values: dict[str, Value] = {**kind, "tokens": tokens, "token_type": types}
    values |= {f"{name}_token_id": number for name, number in named.items()}
    values |= {"add_bos_token": before, "add_eos_token": after}
    found = {f"tokenizer.ggml.{name}": value for name, value in values.items()}
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    if template:
        found["tokenizer.chat_template"] = template
    return found, [*notes, *_stripping(described["added_tokens"])]


def _tokens(described: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """The text and type of every id below `rows`; what is beyond has no row in the embedding, and fails everywhere."""
    known: dict[int, tuple[str, int]] = {number: (text, NORMAL) for text, number in described["model"]["vocab"].items()}
    if described["model"]["byte_fallback"]:
        known |= {n: (text, BYTE) for n, (text, _) in known.items() if BYTE_TOKEN.fullmatch(text)}
    for added in described["added_tokens"]:
        known[added["id"]] = (added["content"], CONTROL if added["special"] else USER_DEFINED)
    unknown = described["model"]["unk_token"]
    known |= {n: (text, UNKNOWN) for n, (text, _) in known.items() if text == unknown}
    filled = [known.get(n, (f"[PAD{n}]", UNUSED)) for n in range(rows)]
    return [text for text, _ in filled], [kind for _, kind in filled]


def _named(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> dict[str, int]:
    """Ids of the tokens that have a part to play, by llama.cpp's names."""
    ends = config.eos_token_id
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else ends[0] if isinstance(ends, list) else ends
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": end,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    return {name: number for name, number in ids.items() if number is not None}


def _bytes(
    described: dict[str, Any], tokenizer: PreTrainedTokenizerBase, tokens: list[str], types: list[int]
) -> Result:
    """Byte-level BPE: merges, and the way a text is cut."""
    notes = []
    if (normalizer := described["normalizer"]) is not None:
        if normalizer["type"] != "NFC":
            raise PlanError(
                f"llama.cpp does not change a text before its tokens, and this tokenizer does ({normalizer})."
            )
        notes.append(
            "llama.cpp does not bring texts into Unicode's form NFC, as the tokenizer does: others may differ."
        )
    model = described["model"]
    found = ways(described["pre_tokenizer"])
    same = [way for way in found if way.ignores_merges == model["ignore_merges"]]
    if not same and not _all_merge(tokenizer, tokens, types):
        raise PlanError(
            f"llama.cpp treats whole tokens otherwise than this tokenizer (ignore_merges, {found[0].name})."
        )
    way: Way = (same or list(found))[0]
    if way.near:
        notes.append(
            f"llama.cpp's {way.name} looks at the case of ASCII letters only: other words may be cut otherwise."
        )
    merges = [" ".join(merge) for merge in model["merges"]]
    return {"model": "gpt2", "pre": way.name, "merges": merges}, notes


def _all_merge(tokenizer: PreTrainedTokenizerBase, tokens: list[str], types: list[int]) -> bool:
    """Whether each token's characters merge to it: then it does not matter if whole tokens are looked up first."""
    model = tokenizer.backend_tokenizer.model
    before, model.ignore_merges = model.ignore_merges, False
    try:
        return all(len(model.tokenize(text)) == 1 for text, kind in zip(tokens, types, strict=True) if kind == NORMAL)
    finally:
        model.ignore_merges = before


def _sentencepiece(
    described: dict[str, Any], tokenizer: PreTrainedTokenizerBase, tokens: list[str], types: list[int]
) -> Result:
    """BPE of SentencePiece: scores, and whether a space comes before a text."""
    prefixed, notes = _prefixed(described)
    normal = {text for text, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    if types.count(BYTE) != 256:
        raise PlanError(f"A SentencePiece tokenizer has 256 tokens for bytes, and this one {types.count(BYTE)}.")
    merges = [tuple(merge) for merge in described["model"]["merges"]]
    rank = _ranks(merges, normal)
    last = -float(len(rank) + 1)
    scores = [
        -float(rank.get(text, len(rank) + 1)) if kind == NORMAL else last
        for text, kind in zip(tokens, types, strict=True)
    ]
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": prefixed}, notes


def _ranks(merges: list[tuple[str, ...]], normal: set[str]) -> dict[str, int]:
    """The place of each merged token in the order of scores."""
    runs = [text for text, _ in groupby(left + right for left, right in merges)]
    rank = {text: place for place, text in enumerate(runs)}
    pairs = set(merges)
    halves = ((text[:n], text[n:]) for text in normal for n in range(1, len(text)))
    if len(rank) < len(runs) or any(
        left in normal and right in normal and (left, right) not in pairs for left, right in halves
    ):
        raise PlanError(
            "The tokenizer's merges are not those of a SentencePiece model: no scores say the same to llama.cpp."
        )
    return rank


def _prefixed(described: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether a space comes before a text, and where llama.cpp does that otherwise."""
    normalizer, cut = described["normalizer"], described["pre_tokenizer"]
    steps = normalizer["normalizers"] if (normalizer or {}).get("type") == "Sequence" else [normalizer]
    if cut == {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}:
        cut = None  # there are no spaces left
    if cut is None and steps in ([PREFIX, SPACES], [SPACES]):
        return PREFIX in steps, []
    match cut:
        case {"type": "Metaspace", "replacement": str(space), "prepend_scheme": str(scheme), "split": False} if (
            normalizer is None and space == SPACE
        ):
            differs = "llama.cpp puts a space before a text that begins with one, and after special tokens: there are"
            return scheme != "never", [] if scheme == "never" else [f"{differs} other tokens than transformers has."]
    raise PlanError(f"The tokenizer's spaces are not those of SentencePiece: {normalizer}, {cut}")


def _around(processor: dict[str, Any] | None, named: dict[str, int | None]) -> tuple[bool, bool]:
    """Whether the first and the last token of a text are added."""
    kinds = (processor or {}).get("processors", [processor] if processor else [])
    templates = [part for part in kinds if part["type"] != "ByteLevel"]
    if not templates:
        return False, False
    if len(templates) > 1 or templates[0]["type"] != "TemplateProcessing":
        raise PlanError(f"llama.cpp adds nothing to a text but its first and last token: {str(processor)[:300]}")
    special = templates[0]["special_tokens"]
    ids = [special[p["SpecialToken"]["id"]]["ids"] if "SpecialToken" in p else None for p in templates[0]["single"]]
    at = ids.index(None)
    before, after = ids[:at], ids[at + 1 :]
    if before not in ([], [[named["bos"]]]) or after not in ([], [[named["eos"]]]):
        raise PlanError(
            f"llama.cpp adds nothing to a text but bos_token and eos_token: {str(templates[0]['single'])[:300]}"
        )
    return bool(before), bool(after)


def _stripping(added: Iterable[dict[str, Any]]) -> list[str]:
    found = [token["content"] for token in added if token["lstrip"] or token["rstrip"] or token["single_word"]]
    if not found:
        return []
    return [f"llama.cpp keeps the spaces beside special tokens that the tokenizer takes away ({found[0]!r}, ...)."]
