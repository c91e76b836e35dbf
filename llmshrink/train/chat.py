"""A conversation as its tokenizer's template lays it out, and which of its tokens are the assistant's.

A template that marks what the assistant says (`{% generation %}`) is asked. With any other the conversation is laid out
turn by turn: what one turn of the assistant adds behind its header is its answer. That holds only where a template
writes the beginning of a conversation as it writes the whole; one that rewrites earlier turns (some leave out what was
thought) is refused.
"""

from __future__ import annotations

import re
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from llmshrink.calibration.text import Record
from llmshrink.errors import InputError

ROLES = ("system", "developer", "user", "assistant", "tool")
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Chat:
    """Lays out conversations."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, answers_only: bool) -> None:
        """Look at the template; with `answers_only` the loss is taken on what the assistant says, else on all.

        Raises:
            InputError: the tokenizer has none, or cannot say which characters a token stands for.
        """
        template = tokenizer.chat_template
        if template is None:
            raise InputError(
                "These are conversations, and the model's tokenizer has no chat template to lay them out with.",
                hint="Put a chat_template.jinja beside the model, or give records with `prompt` and `completion`.",
            )
        if answers_only and not tokenizer.is_fast:
            raise InputError(
                "The model's tokenizer does not say which characters a token stands for: answers cannot be found.",
                hint="Save it with a tokenizer.json, or learn from all of the text: answers_only: false.",
            )
        self._tokenizer, self._answers_only = tokenizer, answers_only
        self._marked = MARKED.search(tokenizer.get_chat_template()) is not None

    def encode(self, record: Record) -> tuple[list[int], list[bool]]:
        """The tokens of a conversation, and whether the loss is taken on each.

        Raises:
            InputError: it is no conversation, nobody answers in it, or the template does not take it.
        """
        messages = messages_of(record)
        tools = record.value.get("tools") or None
        if self._answers_only and not any(message["role"] == "assistant" for message in messages):
            raise InputError(f"{record.where}: the assistant says nothing in it.")
        try:
            if not self._answers_only:
                ids = self._tokenizer(self._laid_out(messages, tools), add_special_tokens=False)["input_ids"]
                return ids, [True] * len(ids)
            found = self._by_marks(messages, tools) if self._marked else self._by_turns(messages, tools, record.where)
        except TemplateError as error:
            raise InputError(f"{record.where}: the chat template does not take it: {error}.") from error
        if not any(found[1]):
            raise InputError(f"{record.where}: the chat template leaves nothing of what the assistant says.")
        return found

    def _by_marks(self, messages: list[dict[str, Any]], tools: Any) -> tuple[list[int], list[bool]]:
        found = self._tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return found["input_ids"], [bool(mark) for mark in found["assistant_masks"]]

    def _by_turns(self, messages: list[dict[str, Any]], tools: Any, where: str) -> tuple[list[int], list[bool]]:
        text = self._laid_out(messages, tools)
        spans = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._laid_out(messages[:turn], tools, add_generation_prompt=True) if turn else ""
            whole = self._laid_out(messages[: turn + 1], tools)
            if not turn or not whole.startswith(before) or not text.startswith(whole):
                raise InputError(
                    f"{where}: in what the chat template writes, message {turn + 1}, which is the assistant's, cannot "
                    "be told from the rest.",
                    hint="Mark it in the template with {% generation %}, or learn from all of it: answers_only: false.",
                )
            spans.append((len(before), len(whole)))
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts = [start for start, _ in found["offset_mapping"]]
        return found["input_ids"], [any(first <= at < last for first, last in spans) for at in starts]

    def _laid_out(self, messages: list[dict[str, Any]], tools: Any, **more: bool) -> str:
        text: str = self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **more)
        return text


def messages_of(record: Record) -> list[dict[str, Any]]:
    """The messages of a conversation.

    Raises:
        InputError: there are none, or one of them is no message.
    """
    messages = record.value.get("messages") if isinstance(record.value, dict) else None
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{record.where}: expected a list of messages under 'messages'.")
    for number, message in enumerate(messages, 1):
        if fault := _fault(message):
            raise InputError(f"{record.where}, message {number}: {fault}.")
    return messages


def _fault(message: Any) -> str | None:
    """What is wrong with a message."""
    if not isinstance(message, dict):
        return "expected an object with `role` and `content`"
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        return f"unknown role {role!r}; known: {', '.join(ROLES)}"
    if role == "assistant" and message.get("tool_calls"):
        return None if content is None or isinstance(content, str) else "`content` must be a string"
    if not isinstance(content, str):
        return "`content` must be a string"
    return "the answer is empty" if role == "assistant" and not content.strip() else None
