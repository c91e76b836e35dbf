"""Whether two models read a text as the same tokens: asked of their tokenizers, not of the widths of their tables."""

from __future__ import annotations

import hashlib
import json

from llmshrink.errors import PlanError
from llmshrink.model.source import Source

# What tokenizers differ in: cases, accents, scripts without spaces, numbers, blanks, code, what no vocabulary has.
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "I don't think it's 3.14159, or 2,718,281 -- is it?",
    "Straße, naïve façade; Žluťoučký kůň",
    "東京と北京 مرحبا Здравствуй 한국어",
    "def f(x):\n\tif x > 0:\n        return x ** 2  # comment\n\n\n",
    "  two  spaces,   three \u00a0 and\ttabs\r\n",
    "\U0001f600\U0001f680 \u200d \ufeff <s> </s> <|endoftext|> <unk>",
)


def check_same_tokens(student: Source, teacher: Source) -> None:
    """Refuse a teacher who reads other tokens than the student.

    Raises:
        PlanError: a probe is encoded otherwise, or one of them knows more tokens.
    """
    one, other = student.tokenizer, teacher.tokenizer
    why = [f"it knows {len(other)} tokens, and {student.id} {len(one)}"] if len(one) != len(other) else []
    probe = next((text for text in PROBES if one(text)["input_ids"] != other(text)["input_ids"]), None)
    why += [] if probe is None else [f"{probe!r} is encoded otherwise"]
    if why:
        raise PlanError(
            f"{teacher.id} reads other tokens than {student.id}: {'; '.join(why)}.",
            hint="Chances are compared token by token: choose a teacher of the same family, or loss.name uld (--loss "
            "uld), which compares them where both end a token.",
        )


def tokens_hash(source: Source) -> str:
    """SHA-256 (hex) of how a model reads text: its vocabulary with the numbers of all tokens, and the probes."""
    tokenizer = source.tokenizer
    probes = [tokenizer(text)["input_ids"] for text in PROBES]
    return hashlib.sha256(json.dumps([sorted(tokenizer.get_vocab().items()), probes]).encode()).hexdigest()


def check_other_tokens(student: Source, teacher: Source) -> None:
    """Refuse tokenizers of which it is not known what each token stands for.

    Raises:
        PlanError: one of them is no fast tokenizer.
    """
    for source in (student, teacher):
        if not source.tokenizer.is_fast:
            raise PlanError(
                f"{source.id}: loss.name uld needs to know what each token stands for, and its tokenizer does not say.",
                hint="A tokenizer.json does: `AutoTokenizer.from_pretrained(...).save_pretrained(...)` may write one.",
            )
