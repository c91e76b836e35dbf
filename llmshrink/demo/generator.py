"""A seeded generator of short stories: the text the embedded model is trained, calibrated and evaluated on.

The stories are hard to guess without a memory: who has which trade, home, pet and character, what lives where and
eats what, which trade mends which material are facts that hold in every story (`world.py`), sums come out right, and
names, pronouns and numbers must agree over many sentences. A language model stores all that in its weights, so
rounding them too coarsely shows.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from llmshrink.demo.plots import ENDINGS, LINKS, OPENINGS, PLOTS, SKIES
from llmshrink.demo.world import PEOPLE, PLACES, PRODUCE, THINGS, WEATHER, Person, Produce

# A seed's remainder modulo SETS chooses the set of stories it draws from; no pair of hero and friend is in two sets.
SETS = 3
TRAIN_SEED, CALIBRATION_SEED, EVALUATION_SEED = 0, 1, 2

SEASONS = ("spring", "summer", "autumn", "winter")
DAYTIMES = ("noon", "midnight", "sunrise", "dusk")
# fmt: off
NUMBERS = (
    "no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)
# fmt: on
TWO_PLOTS = 0.25  # share of the stories that tell two

INNERMOST = re.compile(r"\[([^\[\]]*)\]")
ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")


@dataclass(frozen=True)
class Count:
    """A number of things that can be picked: `seven pears`."""

    n: int
    of: Produce

    @property
    def number(self) -> str:
        """The number in words."""
        return NUMBERS[self.n]

    @property
    def were(self) -> str:
        """The verb that agrees with the number."""
        return "was" if self.n == 1 else "were"

    @property
    def them(self) -> str:
        """The pronoun that agrees with the number."""
        return "it" if self.n == 1 else "them"

    def __str__(self) -> str:
        return f"{self.number} {self.of.one if self.n == 1 else self.of.many}"


def pairs(seed: int) -> list[tuple[Person, Person]]:
    """All pairs of hero and friend that stories of this seed may have: a tenth of all for calibration and evaluation.

    Every person occurs in every set, in both roles.
    """
    tenths = {TRAIN_SEED: range(2, 10), CALIBRATION_SEED: range(1), EVALUATION_SEED: range(1, 2)}[seed % SETS]
    indices = range(len(PEOPLE))
    return [(PEOPLE[i], PEOPLE[j]) for i in indices for j in indices if i != j and (i + 3 * j) % 10 in tenths]


def expand(template: str, rng: random.Random) -> str:
    """Choose one alternative of every `[a|b|...]`, innermost first."""
    while (opened := INNERMOST.search(template)) is not None:
        template = template[: opened.start()] + rng.choice(opened[1].split("|")) + template[opened.end() :]
    return template


def _facts(hero: Person, friend: Person, rng: random.Random) -> dict[str, object]:
    """Draw everything that a story may mention, so that all its sentences speak of the same things."""
    other = rng.choice([p for p in PEOPLE if p not in (hero, friend)])
    thing = rng.choice([t for t in THINGS if t.material not in (hero.trade.material, friend.trade.material)])
    produce = rng.choice(PRODUCE)
    first, more = rng.randint(2, 9), rng.randint(2, 9)
    given = rng.randint(1, first + more - 1)
    price = first * produce.price
    paid = price + 10 - price % 10
    age, gap = 2 * rng.randint(11, 24), rng.randint(2, 9)
    winner, second, last = rng.sample((hero, friend, other), 3)
    return {
        "hero": hero,
        "friend": friend,
        "other": other,
        "master": rng.choice([p for p in PEOPLE if p.trade.material == thing.material]),
        "thing": thing,
        "other_thing": rng.choice([t for t in THINGS if t.material == other.trade.material]),
        "place": rng.choice(PLACES),
        "weather": rng.choice(WEATHER),
        "season": rng.choice(SEASONS),
        "daytime": rng.choice(DAYTIMES),
        "produce": produce,
        "first": Count(first, produce),
        "more": Count(more, produce),
        "total": Count(first + more, produce),
        "given": Count(given, produce),
        "left": Count(first + more - given, produce),
        "price": price,
        "paid": paid,
        "change": paid - price,
        "age": age,
        "gap": NUMBERS[gap],
        "older": age + gap,
        "young": age // 2,
        "winner": winner,
        "second": second,
        "last": last,
    }


def stories(seed: int) -> Iterator[str]:
    """Yield stories for ever; the same seed gives the same stories.

    Args:
        seed: TRAIN_SEED, CALIBRATION_SEED or EVALUATION_SEED, plus any multiple of SETS for another stream from the
            same set. Streams of two sets never share a story: the pairs of hero and friend differ.
    """
    rng = random.Random(seed)  # noqa: S311 - repeatable on purpose
    cast = pairs(seed)
    while True:
        plots = rng.sample(PLOTS, 2 if rng.random() < TWO_PLOTS else 1)
        parts = [rng.choice(OPENINGS), rng.choice(SKIES), plots[0]]
        if len(plots) == 2:
            parts += [rng.choice(LINKS), plots[1]]
        template = "".join([*parts, rng.choice(ENDINGS)])
        text = expand(template, rng).format_map(_facts(*rng.choice(cast), rng))
        yield ARTICLE.sub(r"\1n ", " ".join(text.split()))
