r"""How a text is cut before its pieces are merged, and llama.cpp's name for each way.

A tokenizer.json says it in steps; llama.cpp has a table of names, each with regular expressions in its code. They are
compared by what they do, not by the model's name, and a way that is not in this table is refused: with another one the
same text gives other tokens, and nothing but the quality would show it.

Source: llama.cpp's src/llama-vocab.cpp, where some of the original expressions stand as comments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llmshrink.errors import PlanError

Step = tuple[Any, ...]


class Way(NamedTuple):
    """A way of cutting that llama.cpp has."""

    name: str  # of tokenizer.ggml.pre
    ignores_merges: bool  # a piece that is a token is not merged from its characters
    near: bool = False  # its expression is simpler than the original


_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_OTHER = r"[^\r\n\p{L}\p{N}]?"
_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(digits: str) -> str:
    return rf"{_ENGLISH}|{_OTHER}\p{{L}}+|{digits}|{_REST}"


def _cases(english: str, digits: str) -> str:
    first, second = f"{_OTHER}{_UPPER}*{_LOWER}+{english}", f"{_OTHER}{_UPPER}+{_LOWER}*{english}"
    return f"{first}|{second}|{digits}|{_SLASHES}"


def _split(pattern: str) -> tuple[Step, ...]:
    return (("split", pattern, "Isolated", False), _BYTES)


_BYTES: Step = ("bytes", False)  # every byte a character, the text not cut
_GPT2: Step = ("bytes", True)  # cut by the expression of GPT-2 first

WAYS: dict[tuple[Step, ...], tuple[Way, ...]] = {
    (_GPT2,): (Way("gpt-2", False),),
    (("digits",), _GPT2): (Way("smollm", False),),
    _split(_words(r"\p{N}{1,3}")): (Way("llama-bpe", True), Way("dbrx", False)),
    _split(_words(r"\p{N}")): (Way("qwen2", False),),
    _split(_cases("", r"\p{N}")): (Way("tekken", True, near=True),),
    _split(_cases(_ENGLISH + "?", r"\p{N}{1,3}")): (Way("gpt-4o", False, near=True),),
}
"""The steps of a tokenizer.json -> what llama.cpp has for them."""


def ways(pre_tokenizer: dict[str, Any] | None) -> tuple[Way, ...]:
    """llama.cpp's ways that cut as the `pre_tokenizer` of a byte-level tokenizer.json does.

    Raises:
        PlanError: it has none.
    """
    found = WAYS.get(_steps(pre_tokenizer))
    if not found:
        names = ", ".join(way.name for known in WAYS.values() for way in known)
        raise PlanError(
            f"The tokenizer cuts text in a way that is none of llama.cpp's ({names}): {str(pre_tokenizer)[:300]}",
            hint="A GGUF file would give other tokens for the same text. Choose another format for this model.",
        )
    return found


def _steps(pre_tokenizer: dict[str, Any] | None) -> tuple[Step, ...]:
    kind = (pre_tokenizer or {}).get("type")
    match pre_tokenizer:
        case {"type": "Sequence", "pretokenizers": [*parts]}:
            return tuple(step for part in parts for step in _steps(part))
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(cut)}:
            return (("bytes", cut),)
        case {"type": "Digits", "individual_digits": True}:
            return (("digits",),)
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behaviour, "invert": inverted}:
            return (("split", pattern, behaviour, inverted),)
    return (("unknown", kind),)
