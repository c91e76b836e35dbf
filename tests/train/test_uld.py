"""Words over another vocabulary: sums written out, and places checked by the text before them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny import TEXT, config
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, TrainingArguments

from llmshrink.recipe.distill import LossSpec
from llmshrink.train.alignment import Alignment
from llmshrink.train.losses import divergence
from llmshrink.train.teachers import Foreign, Online
from llmshrink.train.trainer import Distiller
from llmshrink.train.uld import SILENT, Shared, uld

ODD = "The naïve fox 東京 saw 😀 lamps. It's 3.14!"


def chances(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def in_order(p: list[float], q: list[float]) -> float:
    width = max(len(p), len(q))
    ranked = (sorted(x, reverse=True) + [0.0] * (width - len(x)) for x in (p, q))
    return sum(abs(a - b) for a, b in zip(*ranked, strict=True))


Classes = tuple[list[int], list[int]]


def brute(student: Tensor, teacher: Tensor, temperature: float, classes: Classes | None) -> list[float]:
    found = []
    for own, other in zip(student.double().tolist(), teacher.double().tolist(), strict=True):
        q, p = chances(own, temperature), chances(other, temperature)
        if classes is None:
            found.append(temperature * in_order(p, q))
            continue
        kl = 0.0
        for name in {*classes[0], *classes[1]}:
            one, two = (
                sum(value for value, where in zip(row, of, strict=True) if where == name)
                for row, of in ((q, classes[0]), (p, classes[1]))
            )
            kl += two * math.log(two / one)
        rest_q, rest_p = (
            [value for value, where in zip(row, of, strict=True) if where < 0]
            for row, of in ((q, classes[0]), (p, classes[1]))
        )
        found.append(temperature**2 * kl + temperature * in_order(rest_p, rest_q))
    return found


def logits(seed: int, width: int) -> Tensor:
    return 3 * torch.randn(6, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("classes", [None, ([0, 1, 1, 2, -1, 0, -1, 2, 1], [2, 2, -1, 0, 1, 1, 0, 0, -1, -1, 2, 0, 1])])
def test_the_distance_is_its_sum(temperature: float, classes: Classes | None) -> None:
    student, teacher = logits(0, 9), logits(1, 13)
    teacher[2] = SILENT
    shared = None if classes is None else Shared(*map(torch.tensor, classes))
    found = uld(student, teacher, temperature, shared)
    known = [0, 1, 3, 4, 5]
    assert found[known].tolist() == pytest.approx(brute(student[known], teacher[known], temperature, classes), rel=1e-4)
    assert found[2] == 0
    leaf = student.clone().requires_grad_()
    uld(leaf, teacher, temperature, shared).sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all() and not leaf.grad[2].any() and leaf.grad[0].any()


def test_where_nothing_is_said_nothing_is_learned() -> None:
    shared, leaf = Shared(torch.zeros(9).long(), torch.zeros(13).long()), logits(0, 9).requires_grad_()
    found = uld(leaf, torch.full((6, 13), SILENT), 1.0, shared)
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    assert not found.any() and not gradient.any()


def test_of_one_vocabulary_it_is_the_divergence() -> None:
    student, teacher, every = logits(0, 9), logits(1, 9), torch.arange(9)
    spec = LossSpec(temperature=2.0)
    assert torch.allclose(
        uld(student, teacher, 2.0, Shared(every, every)), divergence(student, teacher, spec), rtol=1e-4
    )


def byte_level(size: int) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=size, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<s>")


def like_llama(size: int) -> PreTrainedTokenizerFast:
    """Blanks as a letter, one put before the text; unknown characters as bytes."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


PAIRS = [(byte_level(300), byte_level(400)), (byte_level(330), like_llama(420)), (like_llama(400), byte_level(320))]


@pytest.mark.parametrize(("student", "teacher"), PAIRS, ids=["bytes", "to-blanks", "from-blanks"])
def test_places_have_the_same_text_before_them(
    student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast
) -> None:
    own, other = student.bos_token_id, teacher.bos_token_id
    texts = [ODD, TEXT[0], ODD]
    ids = [token for text in texts for token in (own, *student(text, add_special_tokens=False)["input_ids"])]
    made, places = Alignment(student, teacher).row(ids)
    assert len(places) == len(ids) and made[0] == other
    found = {(i, place) for i, place in enumerate(places) if place >= 0}
    for i, place in found:
        one, two = student.decode(ids[: i + 1]), teacher.decode(made[: place + 1])
        assert one.replace("<s>", "|").replace("| ", "|") == two.replace("<s>", "|").replace("| ", "|")
    # All there are: by the lengths of texts in bytes, which no decoder is asked for here.
    wanted = set()
    for i in range(len(ids)):
        before = student.decode(ids[: i + 1]).replace("<s>", "|").replace("| ", "|")
        if "\ufffd" not in before:
            at = [
                j
                for j in range(len(made))
                if teacher.decode(made[: j + 1]).replace("<s>", "|").replace("| ", "|") == before
            ]
            wanted |= {(i, at[-1])} if at else set()
    assert found == wanted and len(found) > 0.3 * len(ids)


def test_a_row_may_begin_and_end_within_a_character() -> None:
    student, teacher = byte_level(260), like_llama(420)
    ids = student("東 fox 京", add_special_tokens=False)["input_ids"]
    made, places = Alignment(student, teacher).row(ids[1:-1])
    assert made[0] == teacher.bos_token_id and len(places) == len(ids) - 2
    assert places[-1] == places[-2] == -1 and "fox" in teacher.decode(made)


def test_tokens_are_compared_by_the_pieces_that_both_have() -> None:
    """Against the longest beginning that is one token to both, found letter by letter."""
    student, teacher = byte_level(330), like_llama(420)
    own, other = Alignment(student, teacher).classes()
    assert own[student.bos_token_id] == other[teacher.bos_token_id] >= 0
    assert own[student.convert_tokens_to_ids("Ċ")] == other[teacher.convert_tokens_to_ids("<0x0A>")] >= 0
    names: dict[int, str] = {}
    for tokenizer, classes in ((student, own), (teacher, other)):
        for token, name in zip(tokenizer.convert_ids_to_tokens(range(len(tokenizer))), classes, strict=True):
            text = token.replace("Ġ", " ").replace("▁", " ")
            if name >= 0 and text.isascii() and "<" not in text:
                known = names.get(name, text)
                names[name] = known if len(known) < len(text) else text
                assert text.startswith(names[name])
    both = [{t.replace("Ġ", " ").replace("▁", " ") for t in one.get_vocab()} for one in (student, teacher)]
    both[1] |= {chr(i) for i in range(128)}  # as bytes
    assert set(names.values()) <= both[0] & both[1] and len(names) > 50 and " the" in names.values()
    for token, number in teacher.get_vocab().items():
        text = token.replace("▁", " ")
        if text.isascii() and "<" not in text:
            begins = [text[:end] for end in range(1, len(text) + 1) if text[:end] in both[0] & both[1]]
            assert names[other[number]] == begins[-1]


def test_of_one_tokenizer_each_token_is_a_class() -> None:
    for tokenizer in (byte_level(330), like_llama(420)):
        own, other = Alignment(tokenizer, tokenizer).classes()
        texts: dict[int, set[str]] = {}
        for token, name in enumerate(own):
            texts.setdefault(name, set()).add(tokenizer.decode([token]))
        assert own == other and all(len(same) == 1 for name, same in texts.items() if name >= 0)
        assert len(texts) > 100


def model(seed: int, size: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config("llama", vocab_size=size)).eval()
    return made


def batch(tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    rows = [[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]][:20] for text in TEXT[:3]]
    ids = torch.tensor(rows)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)}


def test_a_teacher_speaks_at_its_own_places() -> None:
    student, teacher = PAIRS[0]
    foreign, given = Foreign(model(1, 400), Alignment(student, teacher)), batch(student)
    words = foreign.look(given)
    assert foreign.places is not None
    for row in range(3):
        made, places = Alignment(student, teacher).row(
            given["input_ids"][row][given["attention_mask"][row].bool()].tolist()
        )
        with torch.no_grad():
            logits = foreign.model(torch.tensor([made])).logits[0]
        found = torch.cat([words(slice(0, 7)), words(slice(7, 20))], dim=1)[row]
        for i, place in enumerate(places):
            assert (found[i] == SILENT).all() if place < 0 else torch.allclose(found[i], logits[place], atol=1e-5)
    assert 0.3 < int(foreign.seen[1]) / int(foreign.seen[0]) < 1 and foreign.seen[0] == 55


def test_one_who_reads_the_same_is_learned_from_as_ever(tmp_path: Path) -> None:
    tokenizer, student, teacher = PAIRS[0][0], model(0, 300), model(1, 300).requires_grad_(False)
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    foreign = Foreign(teacher, Alignment(tokenizer, tokenizer))
    pairs = Shared(torch.arange(300), torch.arange(300))
    found = []
    for who, loss, shared in ((Online(teacher), LossSpec(), None), (foreign, LossSpec(name="uld"), pairs)):
        made = Distiller(teacher=who, loss=loss, shared=shared, model=student.train(), args=arguments)
        student.zero_grad()
        value = made.compute_loss(student, batch(tokenizer), num_items_in_batch=50)
        value.backward()
        assert student.lm_head.weight.grad is not None
        found.append((float(value.detach()), student.lm_head.weight.grad.clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5) and torch.allclose(found[0][1], found[1][1], atol=1e-5)
    student.eval()
    with torch.no_grad():
        held = made.compute_loss(student, batch(tokenizer))
        whole = student(**batch(tokenizer)).loss
    assert float(held) == pytest.approx(float(whole), rel=1e-4)
