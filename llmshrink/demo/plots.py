"""The templates of the demo stories.

`[a|b|]` is one of the alternatives (they nest; an empty one leaves the clause out), then `{field}` is filled in from
the facts that `generator.py` draws for the story. A story is one opening, one sky, one or two plots and one ending.
"""

from __future__ import annotations

OPENINGS = (
    "[Once|Long ago|In those days] there [was|lived] a {hero.trade} called {hero} in {hero.village}, "
    "{hero.village.where}. {hero.They} was {hero.trait}: {hero.they} {hero.trait.habit}"
    "[, and {hero.they} {hero.trait.fault}|].",
    "{hero} the {hero.trade} lived in {hero.village}[, {hero.village.where},|] with {hero.pet}. "
    'People said, "{hero} {hero.trait.praise}."[ It was true, for {hero.they} {hero.trait.habit}.|]',
    "Everybody in {hero.village} knew {hero}, [the {hero.trait} {hero.trade}|who made {hero.trade.goods} in the "
    "{hero.trade.room}]. [{hero.Their} {hero.trade.tool} was never still.|{hero.Their} only company was {hero.pet}.|]",
    "This is [the story|a tale] of {hero} from {hero.village} and {friend} from {friend.village}. "
    "One was a {hero.trade} and [the other|{friend}] was a {friend.trade}.",
)

SKIES = (
    " [That day|All week|Since dawn] {weather.sky}[, and {weather.effect}|].[ {hero} put on {weather.wear}.|]",
    " [One {season} day|Early in the {season}|Late in the {season}] {weather.sky}, so that {weather.effect}.",
    "",
)

PLOTS = (
    # A thing is lost and found.
    " {hero} had a {thing} of {thing.material}, which {hero.they} used to {thing.use}. One {daytime} it was gone. "
    "{hero.They} looked [in the {hero.trade.room}|under the bed|behind the {hero.trade.goods}], but found nothing. "
    '"[Have you seen|Do you know where to find] my {thing}?" {hero.they} asked {friend}. '
    '"Look {place.where}, where {place.sight}," [said|answered] {friend}. '
    "The {place.animal} {place.animal.voice} when {hero} came, and there lay the {thing.material} {thing}. "
    "{hero} [thanked {friend}|gave the {place.animal} some {place.animal.food}] and could {thing.use} again.",
    # A thing is broken and mended by the one whose trade it is.
    " {friend}, [the {friend.trade}|a {friend.trade} from {friend.village}], came in with a {thing}. It {thing.harm}. "
    '"[I cannot {thing.use} any more|How shall I {thing.use} now]," {friend.they} said. '
    '"It is made of {thing.material}," said {hero}. "We need a {master.trade}." '
    "So they [walked|went|rode] to {master.village}, {master.village.where}, and knocked at the door of {master}. "
    "{master} took {master.their} {master.trade.tool} and worked until {daytime}. "
    "[{master.They} asked {price} coins, {friend} gave {paid}, and {change} came back|"
    "In return {friend} gave {master.them} some of {friend.their} {friend.trade.goods}]. "
    "After that {friend} could {thing.use} as before.",
    # Picking, adding, giving away.
    " {hero} and {friend} went to {produce.source} to pick {produce.many}. {hero} picked {first} and {friend} picked "
    "{more}, [so together they had {total}|which made {total}]. [On the way {hero} slipped, but nothing was lost.|] "
    "They met {other}, the {other.trade}, who [was hungry|had none], and gave {other.them} {given}. "
    "Now {left} {left.were} left, [just enough for {produce.dish}|and out of {left.them} they made {produce.dish}].",
    # Buying at a fixed price: a product and a difference.
    " When it was time for {hero.village.feast}, {hero} [bought|wanted] {first} from {friend}. "
    '"A {produce.one} costs {produce.price} coins," said {friend}, "so that makes {price} coins." '
    "{hero} paid with {paid} coins and got {change} back. [{hero.They} counted them twice.|] "
    "With the {produce.many} {hero.they} made {produce.dish}[ and shared it with {other}, the {other.trade}|].",
    # A voice in the dark.
    " At {daytime} {hero} heard something {place.where}. It {place.animal.voice} [again and again|three times|softly]. "
    '"[What can that be|Who is there]?" whispered {hero}. "That is a {place.animal}," said {friend}. '
    '"It has {place.animal.looks}, and it wants {place.animal.food}." '
    "They [brought|fetched] {place.animal.food} from {friend.village}, and the {place.animal} ate[ well|]. "
    "In the {season} the {place.animal} came back with a little {place.animal.young}.",
    # A riddle about an animal.
    ' "I know a riddle," said {friend}. "It has {place.animal.looks}. It eats {place.animal.food} and lives '
    '{place.where}. What is it?" {hero} [thought for a while|scratched {hero.their} head]. '
    '"[Is it|It must be] a {place.animal}[|, or its {place.animal.young}]!" {hero.they} [cried|said at last]. '
    '"[Right|You are right]," said {friend}, and [they both laughed|gave {hero.them} {first}].',
    # A riddle about a trade.
    ' "Guess what {other} does," said {friend}. "{other.They} sits in the {other.trade.room} with {other.their} '
    '{other.trade.tool} and makes {other.trade.goods}." "Then {other.they} is a {other.trade}," said {hero}, '
    '"and {other.they} can mend a {other_thing} too." So it was: in {other.village}, {other.village.where}, '
    "{other} had mended the {other_thing} of {friend}, which {other_thing.harm}.",
    # Ages: comparison, a sum, a half.
    " {hero} was {age} years old. {friend} was {gap} years older, so {friend.they} was {older}. {other} was half as "
    "old as {hero}: {other.they} was {young}. [That made {friend} the oldest and {other} the youngest of the three.|"
    "{friend} was the oldest, so {friend.they} went first.] They raced {place.where}: {winner} won, {second} came "
    "second and {last} was last. {winner} got {first} as a prize, and {last} got nothing but a {produce.one}.",
    # A parcel goes from hand to hand.
    " {hero} [wrapped|packed] the {thing.material} {thing} in [linen|paper|wool] for {other}, "
    "who lived far off in {other.village}. {hero} gave it to {friend}, [a {friend.trade}|the {friend.trait} "
    "{friend.trade}], and {friend} carried it {place.where}, where {place.sight}. There the {place.animal} "
    "{place.animal.voice} and {friend} ran. [But the parcel was safe.|] In the end {other} opened it in "
    '{other.their} {other.trade.room}. "Now I can {thing.use}!" {other.they} said, and sent back {first}.',
    # A quarrel that comes from what they are like.
    " {hero} and {friend} quarrelled. {hero} {hero.trait.fault}, and {friend} {friend.trait.fault}. "
    '"You are too {hero.trait}," said {friend}. "And you are too {friend.trait}," said {hero}. '
    "For {first.number} days they did not speak. Then {friend} [lost|broke] {friend.their} {friend.trade.tool}. "
    "{hero} [brought {friend.them} another one|lent {friend.them} {hero.their} own], "
    "and {friend} gave {hero.them} {more}. From then on they were friends[, the {hero.trade} and the "
    "{friend.trade}|].",
)

LINKS = (
    " [The next day|A week later|The same {season}|Soon after that] something else happened.",
    " But that was not all.",
)

ENDINGS = (
    " [People in {hero.village} still talk about it|They still tell it when it is time for {hero.village.feast}].",
    " And {hero} went home to {hero.pet}[ in {hero.village}|].",
    ' "{hero} {hero.trait.praise}," said {friend}, [and went home to {friend.pet}|the {friend.trade}].',
    " In the evening {hero} sat in the {hero.trade.room} with {hero.their} {hero.trade.tool}, and {friend} [went back "
    "to {friend.village}, {friend.village.where}|made {friend.trade.goods}].",
    " Who was it that {hero.trait.habit}? It was {hero}, the {hero.trade} from {hero.village}. "
    "And who {friend.trait.habit}? It was {friend}, the {friend.trade} from {friend.village}.",
)
