"""Secrets become ***, ordinary text stays."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

from llmshrink.redact import redact, redact_data

LONG = "abcdefghijKLMNOPQRST0123456789"
SEEN = {
    f"token hf_{LONG}": "token ***",
    f"'hf_{LONG}',": "'***',",
    f"hf_oauth_{LONG}": "***",
    f"Authorization: Bearer {LONG}": "Authorization: Bearer ***",
    f"{{'authorization': 'Bearer {LONG}='}}": "{'authorization': 'Bearer ***'}",
    "authorization: Basic dXNlcjpwYXNzd29yZA==": "authorization: Basic ***",
    "https://user:pass@host/x": "https://***@host/x",
    "https://token@host/x": "https://***@host/x",
    "redis://:p%40ss@host:1/0": "redis://***@host:1/0",
    "key AKIAIOSFODNN7EXAMPLE.": "key ***.",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.s5f-_x": "***",
    "https://h/f?a=1&X-Amz-Signature=00ff&X-Amz-Credential=me&b=2": "https://h/f?a=1&X-Amz-Signature=***"
    "&X-Amz-Credential=***&b=2",
    "https://h/f?access_token=x&api_key=y": "https://h/f?access_token=***&api_key=***",
}
ORDINARY = [
    "model.embed_tokens.weight, 16,320 tokens at 44.5 tok/s",
    "the bearer of this letter; basic arithmetic; a secret garden",
    "hf_hub_download, HF_TOKEN, hf auth login, batch_tokens=192",
    "https://huggingface.co/owner/name@main, someone@example.org, file:///tmp/a@b",
    "0123456789abcdef" * 4,
    "AKIA is four letters",
]


@pytest.mark.parametrize(("text", "expected"), SEEN.items())
def test_what_looks_like_a_secret_is_hidden(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(redact(text)) == expected
    assert redact(f"before\n{text}\nbehind") == f"before\n{expected}\nbehind"


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_stays(text: str) -> None:
    assert redact(text) == text


NAMES = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "MY_APIKEY"]
NAMES += ["GITHUB_TOKEN", "db_password", "CLIENT_SECRET", "SSH_PRIVATE_KEY", "GOOGLE_CREDENTIALS"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["correct horse", 'quo"ted\\back', "gr\u00fc\u00dfe-an-alle", "a/b?c=d&e f"])
def test_values_of_secret_variables_are_hidden_however_they_are_written(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    import json
    from urllib.parse import quote

    monkeypatch.setenv(name, f"{value}\n")
    for written in (value, repr(value), json.dumps(value), json.dumps(value, ensure_ascii=False), quote(value, "")):
        assert "***" in redact(f"x{written}y") and redact(f"x{written}y").strip("xy'\"") == "***"


@pytest.mark.parametrize("name", ["PATH", "HOME", "TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH", "KEYBOARD"])
def test_values_of_other_variables_stay(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "some-longer-value")
    assert redact("some-longer-value") == "some-longer-value"


def test_a_short_value_is_also_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "model")
    assert redact("the model") == "the model"


def test_the_token_that_was_stored_by_a_login_is_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("stored-by-login\n")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert redact("it is stored-by-login") == "it is ***"


def test_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "correct horse")
    found = redact_data({"a correct horse": ["correct horse", 1, None, {"b": "https://u:p@h"}], "c": 0.5})
    assert found == {"a ***": ["***", 1, None, {"b": "https://***@h"}], "c": 0.5}


PIECES = st.sampled_from(
    [*SEEN, *ORDINARY, "***", "Bearer ", "://", "@", "hf_", "eyJ", ".", "?token=", "correct horse"]
)


@given(st.lists(st.text() | PIECES, max_size=6).map("".join))
def test_redaction_is_idempotent(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "correct horse")
        once = redact(text)
        assert redact(once) == once and "correct horse" not in once


@given(st.text(alphabet=st.characters(exclude_characters="@?&", exclude_categories=["Cs"])))
def test_text_without_secrets_is_left_alone(text: str) -> None:
    if not any(word in text.lower() for word in ("hf_", "akia", "asia", "eyj", "bearer", "basic")):
        assert redact(text) == text
