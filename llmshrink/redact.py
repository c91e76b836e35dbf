"""Secrets out of text: the values of this process's secret variables, and whatever looks like a token.

Everything that is printed, and every file that is written for people, goes through here: libraries quote headers and
addresses in their errors, and users type tokens where none belong.
"""

from __future__ import annotations

import json
import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

HIDDEN = "***"
SHORTEST = 8  # characters of a value that is known to be secret: a shorter one is also part of ordinary words

_SECRET_NAME = re.compile(
    r"(?!.*_(PATH|FILE|DIR)$).*"
    r"(TOKEN(?!IZERS)|SECRET|PASSW(OR)?D|PASSPHRASE|CREDENTIAL|(API|ACCESS|PRIVATE)_?KEY)",
    re.IGNORECASE,
)
_WORD = r"[A-Za-z0-9_\-]"
_PATTERNS = (
    (re.compile(r"hf_(?:[a-z]+_)?[A-Za-z0-9]{20,}"), HIDDEN),  # Hugging Face
    (re.compile(r"(?:AKIA|ASIA)[A-Z0-9]{16}"), HIDDEN),  # AWS
    (re.compile(rf"eyJ{_WORD}{{10,}}\.{_WORD}{{10,}}\.{_WORD}+"), HIDDEN),  # a JSON web token
    (re.compile(r"\b(bearer|authorization: basic) +[\w.~+/\-]{12,}=*", re.IGNORECASE), rf"\1 {HIDDEN}"),
    (re.compile(r"(\b[a-z][a-z0-9+.\-]{1,20}://)[^\s/@'\"]+@", re.IGNORECASE), rf"\1{HIDDEN}@"),  # user:password@host
    (re.compile(r"([?&][\w\-]*(?:token|key|signature|credential|password)=)[^&\s'\"]+", re.IGNORECASE), rf"\1{HIDDEN}"),
)


def redact(text: str) -> str:
    """The text with `***` in place of every secret; text without one comes back as it was."""
    return _without(text, _known())


def redact_data(value: Any) -> Any:
    """Data as JSON knows it, with `redact` applied to every text in it, keys too."""
    known = _known()  # a report has thousands of texts

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            return _without(value, known)
        if isinstance(value, list):
            return [clean(item) for item in value]
        return {clean(k): clean(item) for k, item in value.items()} if isinstance(value, dict) else value

    return clean(value)


def _without(text: str, known: list[str]) -> str:
    for value in known:
        text = text.replace(value, HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def _known() -> list[str]:
    """Secret values, as they are and as they look in Python, JSON and addresses; the longest first."""
    values = {value for name, value in os.environ.items() if _SECRET_NAME.match(name)} | {_stored_token()}
    forms = {form for value in map(str.strip, values) if _is_secret(value) for form in _forms(value)}
    return sorted(forms, key=len, reverse=True)


def _is_secret(value: str) -> bool:
    """Not a short value, a plain word or a path that is there: these stand in ordinary output too."""
    return (
        len(value) >= SHORTEST and not (value.isascii() and value.isalpha() and value.islower()) and not _there(value)
    )


def _there(value: str) -> bool:
    try:
        return value.startswith("/") and Path(value).exists()
    except (OSError, ValueError):
        return False


@cache
def _forms(value: str) -> tuple[str, ...]:
    return value, repr(value)[1:-1], *(json.dumps(value, ensure_ascii=a)[1:-1] for a in (True, False)), quote(value, "")


def _stored_token() -> str:
    """What `hf auth login` stored. The Hub's own `get_token` may ask the network; who never loaded it sent no token."""
    constants = sys.modules.get("huggingface_hub.constants")
    try:
        return Path(constants.HF_TOKEN_PATH).read_text(encoding="utf-8") if constants else ""
    except (OSError, ValueError):
        return ""
