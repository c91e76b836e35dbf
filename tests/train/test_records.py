"""Entries become tokens with the right ones learned, and what is no entry is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import TEXT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llmshrink.calibration.text import Record, records
from llmshrink.errors import InputError
from llmshrink.recipe.train import TrainSpec
from llmshrink.train import records as module
from llmshrink.train.records import Records, _stretches, kind_of

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<s>{% endgeneration %}{% else %}{{ m.content }}<s>{% endif %}{{ '\n' }}{% endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and not loop.last %}..."
    "{% else %}{{ m.content }}{% endif %}<s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brave."},
    {"role": "user", "content": "Who sat by the river?"},
    {"role": "assistant", "content": "The old fox."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "It rained."},
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """One that knows every byte."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<s>")


def read(tokenizer: PreTrainedTokenizerBase, *values: Any, **spec: Any) -> list[tuple[str, str]]:
    """What each entry becomes, and what of it is learned, both in words."""
    found = Records(TrainSpec(**spec), tokenizer).examples(Record(v, f"line {i}") for i, v in enumerate(values, 1))
    return [(tokenizer.decode(e.ids), tokenizer.decode(e.ids[e.learned])) for e in found]


@pytest.mark.parametrize(
    ("names", "column", "kind"),
    [
        (["messages", "text"], None, "chat"),
        (["prompt", "completion"], None, "prompt"),
        (["text", "prompt", "completion"], None, "prompt"),
        (["question", "answer", "id"], None, "prompt"),
        (["instruction", "input", "output"], None, "prompt"),
        (["instruction", "output", "text"], None, "text"),
        (["prompt"], None, "text"),
        (["question", "answer"], "answer", "text"),
        (["story"], None, "text"),
    ],
)
def test_keys_tell_the_kind(names: list[str], column: str | None, kind: str) -> None:
    assert kind_of(names, column) == kind


@pytest.mark.parametrize(
    ("value", "asked", "answer"),
    [
        ({"prompt": "The old", "completion": " fox"}, "The old", " fox"),
        ({"question": "Who?", "answer": "The fox."}, "Who?\n", "The fox."),
        ({"instruction": "Name it.", "output": "A clock."}, "Name it.\n", "A clock."),
        ({"instruction": "Name it.", "input": "It ticks.", "output": "A clock."}, "Name it.\nIt ticks.\n", "A clock."),
    ],
)
def test_only_the_answer_is_learned(
    tokenizer: PreTrainedTokenizerBase, value: dict[str, str], asked: str, answer: str
) -> None:
    assert read(tokenizer, value) == [(f"{asked}{answer}<s>", f"{answer}<s>")]
    assert read(tokenizer, value, answers_only=False) == [(f"{asked}{answer}<s>", f"{asked}{answer}<s>")]


SPACED = {"The cat sat on the m": "at.", "Q:": " yes", "": "The fox"}


@pytest.fixture
def spaced() -> PreTrainedTokenizerBase:
    """One that begins every text with a space, as SentencePiece does, and knows `mat`."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<s>"], show_progress=False)
    made.train_from_iterator(["The cat sat on the mat. Q: yes The fox"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<s>")


@pytest.mark.parametrize("fast", [True, False])
def test_a_prompt_and_its_answer_are_one_text(
    spaced: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", fast)  # one that is not says not where a token ends
    found = read(spaced, *({"prompt": asked, "completion": answer} for asked, answer in SPACED.items()))
    assert found == [
        ("The cat sat on the mat.<s>", "mat.<s>"),  # a token that crosses the border is of the answer
        ("Q: yes<s>", "yes<s>"),
        ("The fox<s>", "The fox<s>"),
    ]


def test_a_border_in_a_long_text_is_found(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STRETCH", 10)
    asked, answer = "The old fox sat by the river and looked", " at all the boats that went by."
    ((whole, learned),) = read(tokenizer, {"prompt": asked, "completion": answer})
    assert (whole, learned) == (f"{asked}{answer}<s>", f"{answer}<s>")


def test_a_prompt_begins_as_the_tokenizer_begins_a_text(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert read(tokenizer, {"prompt": "The", "completion": " fox"}) == [("<s>The fox<s>", " fox<s>")]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_only_the_assistant_is_learned(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    tokenizer.chat_template = template
    newline = "\n" if template == CHATML else ""
    whole = "".join(f"<|{m['role']}|>{m['content']}<s>\n" for m in TALK)
    ((text, learned),) = read(tokenizer, {"messages": TALK})
    assert (text, learned) == (whole, f"The old fox.<s>{newline}It rained.<s>{newline}")
    assert read(tokenizer, {"messages": TALK}, answers_only=False) == [(whole, whole)]


def test_a_template_that_rewrites_what_was_said_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(InputError, match=r"line 1: .*message 3, which is the assistant's, cannot be told"):
        read(tokenizer, {"messages": TALK})
    assert read(tokenizer, {"messages": TALK[1:3]})[0][1] == "The old fox.<s>"
    ((whole, learned),) = read(tokenizer, {"messages": TALK}, answers_only=False)
    assert whole == learned


def message(role: str = "user", content: Any = "Who?", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (
            {"prompt": "a", "answer": "b"},
            r"line 2: expected the keys 'prompt' and 'completion', or .*it has: prompt, a",
        ),
        ({"prompt": "a", "completion": 5}, "line 2: expected a string under 'completion'"),
        ({"prompt": "a", "completion": " \n"}, "line 2: the answer under 'completion' is empty"),
        ({"instruction": "a", "input": 5, "output": "b"}, "line 2: expected a string under 'input'"),
        ("plain", "line 2: expected an object with a prompt"),
    ],
)
def test_a_bad_prompt_is_named(tokenizer: PreTrainedTokenizerBase, value: Any, why: str) -> None:
    with pytest.raises(InputError, match=why):
        read(tokenizer, {"prompt": "The", "completion": " fox"}, value)


@pytest.mark.parametrize(
    ("spec", "value", "why"),
    [
        (
            {},
            {"prompt": "a", "completion": "b"},
            r"line 2 is a prompt with its answer by its keys \(prompt, completion",
        ),
        ({}, {"text": "a", "messages": []}, "line 2 is a conversation by its keys"),
        ({}, {"story": "a"}, "line 2 has no column 'text'; it has: story"),
        ({"kind": "text"}, {"prompt": "a", "completion": "b"}, "line 2 has no column 'text'"),
        ({"column": "text"}, {"prompt": "a", "completion": "b"}, "line 2 has no column 'text'"),
    ],
)
def test_what_is_no_text_among_texts_is_named(
    tokenizer: PreTrainedTokenizerBase, spec: dict[str, str], value: Any, why: str
) -> None:
    assert len(read(tokenizer, {"text": "The old fox"}, {"text": "went", "id": 5}, "home", **spec)) == 3
    with pytest.raises(InputError, match=why):
        read(tokenizer, {"text": "The old fox"}, value, **spec)


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        (None, "line 1: expected a list of messages"),
        ([], "line 1: expected a list of messages"),
        ([message(), "no"], "line 1, message 2: expected an object"),
        ([message("human")], "line 1, message 1: unknown role 'human'; known: system, developer, user"),
        ([message(content=None)], "line 1, message 1: `content` must be a string"),
        ([message(), message("assistant", " ")], "line 1, message 2: the answer is empty"),
        ([message()], "line 1: the assistant says nothing"),
        ([message("assistant", "I.")], "line 1: .*message 1, .* cannot be told from the rest"),
    ],
)
def test_a_bad_conversation_is_named(tokenizer: PreTrainedTokenizerBase, messages: Any, why: str) -> None:
    tokenizer.chat_template = CHATML
    with pytest.raises(InputError, match=why):
        read(tokenizer, {"messages": messages})


def test_what_a_template_does_not_take_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(InputError, match="line 1: the chat template does not take it: no system here"):
        read(tokenizer, {"messages": TALK})


def test_conversations_need_a_template(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match="no chat template") as caught:
        read(tokenizer, {"messages": TALK})
    assert "prompt" in str(caught.value.hint)


def test_lines_of_a_file_and_rows_of_a_table_are_named(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"prompt": "The", "completion": " fox", "id": 1}, {"prompt": "The", "completion": None, "id": 2}]
    (tmp_path / "a.jsonl").write_text("\n".join(["", *map(json.dumps, rows)]))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name, place in (("a.jsonl", "line 3"), ("a.parquet", "row 2")):
        reader = Records(TrainSpec(), tokenizer)
        found = records(str(tmp_path / name), seed=0, split="train", columns=reader.columns)
        with pytest.raises(InputError, match=f"{name}, {place}: expected a string under 'completion'"):
            list(reader.examples(found))


def test_many_texts_are_as_each_alone(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read(tokenizer, *TEXT, packing=False)
    assert whole == [(f"<s>{text}", f"<s>{text}") for text in TEXT]
    monkeypatch.setattr(module, "STRETCH", 100)
    assert read(tokenizer, *TEXT, packing=False) == whole


def test_a_long_text_is_cut_where_words_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STRETCH", 10)
    assert list(_stretches("The old fox\nwent")) == ["The old", " fox\nwent"]
    assert list(_stretches("a" * 25)) == ["a" * 10, "a" * 10, "a" * 5]
    assert list(_stretches("short")) == ["short"]
