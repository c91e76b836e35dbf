"""The story generator: repeatable, disjoint sets, and text that keeps its own rules."""

from __future__ import annotations

import itertools
import random
import re
import subprocess
import sys

import pytest

from llmshrink.demo import CALIBRATION_SEED, EVALUATION_SEED, TRAIN_SEED, stories
from llmshrink.demo.generator import NUMBERS, SETS, expand, pairs
from llmshrink.demo.world import ANIMALS, PEOPLE, PLACES, PRODUCE, THINGS, TRADES

SEEDS = (TRAIN_SEED, CALIBRATION_SEED, EVALUATION_SEED)


def take(seed: int, count: int) -> list[str]:
    return list(itertools.islice(stories(seed), count))


@pytest.fixture(scope="module")
def sample() -> list[str]:
    return take(TRAIN_SEED, 2000)


def test_same_seed_same_stories() -> None:
    assert take(7, 50) == take(7, 50)
    assert take(7, 50) != take(7 + SETS, 50)


def test_stories_do_not_depend_on_the_process() -> None:
    code = "import itertools; from llmshrink.demo import stories; print(*itertools.islice(stories(4), 5), sep='\\n')"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == take(4, 5)


def test_no_story_occurs_in_two_sets() -> None:
    train, calibration, evaluation = (set(take(seed, 5000)) for seed in SEEDS)
    assert not train & calibration
    assert not train & evaluation
    assert not calibration & evaluation


def test_sets_split_the_pairs_of_hero_and_friend() -> None:
    casts = [{(hero.name, friend.name) for hero, friend in pairs(seed)} for seed in SEEDS]
    assert sum(map(len, casts)) == len(set().union(*casts)) == len(PEOPLE) * (len(PEOPLE) - 1)
    for cast in casts:
        for role in (0, 1):
            assert {pair[role] for pair in cast} == {person.name for person in PEOPLE}
    assert pairs(EVALUATION_SEED + 5 * SETS) == pairs(EVALUATION_SEED)


def test_stories_hardly_repeat() -> None:
    assert len(set(take(EVALUATION_SEED, 3000))) == 3000


def test_text_is_clean(sample: list[str]) -> None:
    for story in sample:
        assert not re.search(r"[\[\]{}|<>]|  |\n| [.,]|\ba [aeiou]|\ban [^aeiou]", story), story
        assert story[0].isupper()
        assert story[-1] in ".!"
        assert story.count('"') % 2 == 0


def test_every_fact_is_told(sample: list[str]) -> None:
    text = " ".join(sample)
    for name in [*(p.name for p in PEOPLE), *(t.name for t in TRADES), *(a.name for a in ANIMALS)]:
        assert name in text
    for phrase in [*(p.where for p in PLACES), *(t.name for t in THINGS), *(p.dish for p in PRODUCE)]:
        assert phrase in text


def test_sums_come_out_right(sample: list[str]) -> None:
    text = " ".join(sample)
    shopping = re.findall(r"costs (\d+) coins.*?makes (\d+) coins.*?with (\d+) coins and got (\d+) back", text)
    bought = re.findall(r"(?:bought|wanted) (\w+) \w+ from", text)
    assert len(shopping) == len(bought) > 100
    for (each, price, paid, change), count in zip(shopping, bought, strict=True):
        assert NUMBERS.index(count) * int(each) == int(price)
        assert int(paid) - int(price) == int(change)
    picked = re.findall(
        r"picked (\w+) \w+ and \w+ picked (\w+) \w+, (?:so together they had|which made) (\w+) .*?"
        r"gave (?:her|him) (\w+) \w+\. Now (\w+) (\w+) (was|were) left",
        text,
    )
    assert len(picked) > 100
    for *numbers, noun, verb in picked:
        first, more, total, given, left = map(NUMBERS.index, numbers)
        assert first + more == total == given + left
        assert (verb == "was") == (left == 1) == (noun in {produce.one for produce in PRODUCE})


def test_people_keep_their_facts(sample: list[str]) -> None:
    by_name = {person.name: person for person in PEOPLE}
    found = re.findall(
        r"there (?:was|lived) an? ([\w ]+) called (\w+) in ([\w ]+), .*?\. (\w+) was (\w+):", " ".join(sample)
    )
    assert len(found) > 100
    for trade, name, village, pronoun, trait in found:
        person = by_name[name]
        assert (trade, village, pronoun, trait) == (
            person.trade.name,
            person.village.name,
            person.They,
            person.trait.name,
        )


def test_mender_has_the_right_trade(sample: list[str]) -> None:
    by_name = {person.name: person for person in PEOPLE}
    found = re.findall(r"made of (\w+),.*?We need an? ([\w ]+)\..*?at the door of (\w+)\.", " ".join(sample))
    assert len(found) > 50
    for material, trade, name in found:
        assert by_name[name].trade.name == trade
        assert by_name[name].trade.material == material


def test_expand_chooses_among_nested_alternatives() -> None:
    rng = random.Random(0)
    seen = {expand("x[a|b[c|d]|] {field}", rng) for _ in range(200)}
    assert seen == {"xa {field}", "xbc {field}", "xbd {field}", "x {field}"}


def test_importing_the_demo_does_not_import_torch() -> None:
    code = "import sys; import llmshrink.demo; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
