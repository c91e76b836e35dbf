"""The facts of the world the demo stories are set in. They never change, so a model has to hold them in its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Trade(NamedTuple):
    """What somebody does for a living."""

    name: str
    room: str
    tool: str
    goods: str
    material: str  # what this trade can mend

    def __str__(self) -> str:
        return self.name


class Village(NamedTuple):
    """Where somebody lives."""

    name: str
    where: str
    feast: str

    def __str__(self) -> str:
        return self.name


class Trait(NamedTuple):
    """What somebody is like, how it shows, and what people make of it."""

    name: str
    habit: str
    fault: str
    praise: str

    def __str__(self) -> str:
        return self.name


class Animal(NamedTuple):
    """An animal, with its voice, its favourite food and its young."""

    name: str
    voice: str
    food: str
    young: str
    looks: str

    def __str__(self) -> str:
        return self.name


class Place(NamedTuple):
    """A spot outside the villages and the animal that lives there."""

    where: str
    name: str
    sight: str
    animal: Animal


class Thing(NamedTuple):
    """An object, what it is made of and what it is for."""

    name: str
    material: str
    use: str
    harm: str

    def __str__(self) -> str:
        return self.name


class Produce(NamedTuple):
    """Something that is counted, and where it is picked."""

    one: str
    many: str
    source: str
    dish: str
    price: int  # coins


class Weather(NamedTuple):
    """What the sky does, what it does to people, and what they wear."""

    sky: str
    effect: str
    wear: str


@dataclass(frozen=True)
class Person:
    """Somebody with a fixed name, pronoun, trade, home, character and pet."""

    name: str
    they: str
    them: str
    their: str
    trade: Trade
    village: Village
    trait: Trait
    pet: str

    @property
    def They(self) -> str:  # noqa: N802 - the capital is the point
        """The pronoun at the start of a sentence."""
        return self.they.capitalize()

    @property
    def Their(self) -> str:  # noqa: N802
        """The possessive at the start of a sentence."""
        return self.their.capitalize()

    def __str__(self) -> str:
        return self.name


TRADES = (
    Trade("smith", "forge", "hammer", "nails", "iron"),
    Trade("carpenter", "workshop", "saw", "chairs", "wood"),
    Trade("potter", "kiln house", "wheel", "bowls", "clay"),
    Trade("weaver", "long room", "loom", "blankets", "wool"),
    Trade("cobbler", "cellar", "awl", "boots", "leather"),
    Trade("glazier", "glass house", "blowpipe", "bottles", "glass"),
    Trade("tailor", "attic", "needle", "coats", "linen"),
    Trade("basket maker", "barn", "knife", "baskets", "willow"),
    Trade("mason", "stone yard", "chisel", "steps", "stone"),
    Trade("goldsmith", "small shop", "file", "rings", "silver"),
    Trade("printer", "print room", "press", "books", "paper"),
    Trade("rope maker", "rope walk", "hook", "nets", "hemp"),
)

VILLAGES = (
    Village("Elmford", "on the river", "the feast of boats"),
    Village("Harrowby", "among the wheat fields", "the harvest dance"),
    Village("Stonewick", "under the cliff", "the night of fires"),
    Village("Saltmere", "beside the sea", "the herring fair"),
    Village("Upper Fenn", "at the edge of the marsh", "the frog race"),
    Village("Pinedale", "deep in the forest", "the day of masks"),
    Village("Coldbrook", "high in the hills", "the snow market"),
    Village("Larkhill", "on a sunny slope", "the kite festival"),
)

TRAITS = (
    Trait("patient", "never hurried", "was often late", "can wait for a snail"),
    Trait("curious", "asked about everything", "opened every door", "finds what others miss"),
    Trait("brave", "feared nothing", "took too many risks", "would face a storm alone"),
    Trait("careful", "checked every knot twice", "worried about small things", "has never broken a cup"),
    Trait("generous", "shared every meal", "gave too much away", "has a heart as wide as a door"),
    Trait("stubborn", "never gave up", "would not listen", "is as firm as an oak"),
    Trait("cheerful", "sang at work", "joked at the wrong time", "brings the sun indoors"),
    Trait("quiet", "spoke little", "kept too many secrets", "hears what nobody says"),
    Trait("clever", "knew many tricks", "laughed at slow people", "could teach a fox"),
    Trait("honest", "always told the truth", "could be too blunt", "has never told a lie"),
)

ANIMALS = (
    Animal("owl", "hooted", "mice", "owlet", "round eyes and soft wings"),
    Animal("goat", "bleated", "thistles", "kid", "horns and a short beard"),
    Animal("frog", "croaked", "flies", "tadpole", "green skin and long legs"),
    Animal("fox", "barked", "berries", "cub", "a red coat and a bushy tail"),
    Animal("donkey", "brayed", "carrots", "foal", "long ears and a grey back"),
    Animal("goose", "honked", "grass", "gosling", "a white neck and flat feet"),
    Animal("pig", "grunted", "acorns", "piglet", "a pink nose and a curly tail"),
    Animal("raven", "cawed", "worms", "chick", "black feathers and a strong beak"),
    Animal("wolf", "howled", "meat", "pup", "yellow eyes and sharp teeth"),
    Animal("hedgehog", "snuffled", "beetles", "hoglet", "many spines and a small snout"),
    Animal("seal", "yelped", "fish", "pup", "whiskers and flippers"),
    Animal("horse", "neighed", "oats", "foal", "a long mane and hard hooves"),
    Animal("bear", "growled", "honey", "cub", "thick fur and heavy paws"),
    Animal("sheep", "baaed", "clover", "lamb", "a woolly back and a black face"),
)

PLACES = (
    Place("under the hollow oak", "the hollow oak", "mushrooms grew in a ring", ANIMALS[0]),
    Place("on the stony pass", "the stony pass", "the path was steep", ANIMALS[1]),
    Place("near the lily pond", "the lily pond", "the water was still", ANIMALS[2]),
    Place("behind the ruined tower", "the ruined tower", "ivy covered the walls", ANIMALS[3]),
    Place("along the dusty road", "the dusty road", "carts rolled past", ANIMALS[4]),
    Place("below the mill dam", "the mill dam", "foam danced on the water", ANIMALS[5]),
    Place("between the beech trees", "the beech wood", "dry leaves covered the ground", ANIMALS[6]),
    Place("beneath the church roof", "the church roof", "the bell hung in the dark", ANIMALS[7]),
    Place("across the frozen lake", "the frozen lake", "the ice creaked", ANIMALS[8]),
    Place("inside the walled garden", "the walled garden", "roses climbed the bricks", ANIMALS[9]),
    Place("around the grey rocks", "the grey rocks", "waves broke into spray", ANIMALS[10]),
    Place("over the wide meadow", "the wide meadow", "the grass stood high", ANIMALS[11]),
    Place("past the deep cave", "the deep cave", "water dripped from the stones", ANIMALS[12]),
    Place("beyond the green hill", "the green hill", "small flowers shone", ANIMALS[13]),
)

THINGS = (
    Thing("kettle", "iron", "boil water", "had a hole"),
    Thing("key", "iron", "open the old chest", "was bent"),
    Thing("plough", "iron", "turn the soil", "had lost its blade"),
    Thing("flute", "wood", "play at weddings", "was cracked"),
    Thing("ladder", "wood", "reach the loft", "had lost two rungs"),
    Thing("cradle", "wood", "rock the baby", "had a loose leg"),
    Thing("jug", "clay", "carry milk", "had no handle"),
    Thing("oil lamp", "clay", "light the stairs", "was in pieces"),
    Thing("shawl", "wool", "keep warm", "was full of moths"),
    Thing("cap", "wool", "cover both ears", "had come undone"),
    Thing("saddle", "leather", "ride to town", "had a torn strap"),
    Thing("purse", "leather", "hold coins", "had a split seam"),
    Thing("mirror", "glass", "comb long hair", "was in splinters"),
    Thing("lens", "glass", "read small letters", "had a deep scratch"),
    Thing("shirt", "linen", "look fine on holidays", "had lost its sleeve"),
    Thing("sail", "linen", "catch the wind", "was ripped in two"),
    Thing("fish trap", "willow", "catch eels", "had a gap"),
    Thing("hamper", "willow", "take bread to the field", "had no lid"),
    Thing("doorstep", "stone", "sit in the evening sun", "had sunk"),
    Thing("sundial", "stone", "tell the time", "leaned to one side"),
    Thing("brooch", "silver", "fasten a cloak", "had a broken pin"),
    Thing("spoon", "silver", "eat soup", "was flat"),
    Thing("map", "paper", "find the way", "was faded"),
    Thing("almanac", "paper", "know the moon", "had lost its cover"),
    Thing("hammock", "hemp", "sleep outdoors", "was frayed"),
    Thing("bell rope", "hemp", "call the village", "had snapped"),
)

PRODUCE = (
    Produce("pear", "pears", "the tree behind the barn", "a sweet tart", 3),
    Produce("plum", "plums", "the hedge", "a pot of jam", 2),
    Produce("cherry", "cherries", "the highest branches", "a red pie", 8),
    Produce("egg", "eggs", "the hen house", "a big omelette", 4),
    Produce("turnip", "turnips", "the muddy field", "a thick stew", 5),
    Produce("onion", "onions", "the kitchen garden", "a brown soup", 2),
    Produce("walnut", "walnuts", "the old walnut tree", "a nut cake", 6),
    Produce("cabbage", "cabbages", "the lower field", "a jar of pickle", 7),
    Produce("apple", "apples", "the orchard", "a jug of cider", 3),
    Produce("leek", "leeks", "the wet corner", "a white broth", 4),
)

WEATHER = (
    Weather("rain fell in sheets", "the paths turned to mud", "a long oilskin"),
    Weather("snow lay on the roofs", "every step was slow", "two pairs of socks"),
    Weather("the sun burned", "nobody could think", "a straw hat"),
    Weather("fog hid the fields", "even the dogs got lost", "a bright scarf"),
    Weather("a gale blew from the west", "shutters banged", "a tight hood"),
    Weather("hail drummed on the carts", "everyone ran indoors", "a padded jacket"),
    Weather("thunder rolled far away", "the cows were restless", "a heavy coat"),
    Weather("a warm breeze came up", "the washing dried at once", "a thin jacket"),
    Weather("frost covered the grass", "breath hung in the air", "thick mittens"),
    Weather("stars filled the sky", "the whole valley was silent", "a dark cloak"),
)

PETS = ("a grey cat", "a lame dog", "a tame crow", "a white rabbit", "an old parrot", "a green lizard", "a fat hen")

# fmt: off
WOMEN = (
    "Ada", "Berit", "Cora", "Dora", "Elin", "Fenna", "Greta", "Hilda", "Ines", "Jorun", "Kaja", "Lotte",
    "Mira", "Nora", "Olga", "Petra", "Rosa", "Signe", "Thea", "Una", "Vera", "Wilma", "Yrsa", "Zita",
)
MEN = (
    "Anton", "Bruno", "Casper", "David", "Emil", "Felix", "Gregor", "Hugo", "Ivan", "Jonas", "Karl", "Leo",
    "Marek", "Niels", "Otto", "Pavel", "Rolf", "Simon", "Tomas", "Ulf", "Viktor", "Walter", "Yann", "Zeno",
)
# fmt: on


def _people() -> tuple[Person, ...]:
    """Give every name its facts by index arithmetic: every trade has four people, spread over the villages."""
    people = []
    for i, name in enumerate(WOMEN + MEN):
        they, them, their = ("she", "her", "her") if name in WOMEN else ("he", "him", "his")
        trade, village = TRADES[5 * i % 12], VILLAGES[(3 * i + i // 8) % 8]
        trait, pet = TRAITS[(7 * i + i // 10) % 10], PETS[(2 * i + i // 7) % 7]
        people.append(Person(name, they, them, their, trade, village, trait, pet))
    return tuple(people)


PEOPLE = _people()
