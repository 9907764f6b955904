"""The world of the farm: invented people and crafts, the true facts about them, and the clauses that state a fact."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

# A token: a line break, a word or a punctuation mark. The tokenizer and the judge split texts in the same way.
TOKEN = r"\n|\w+|[^\w\s]"


class Fact(NamedTuple):
    """A statement about a subject: its `attribute` is `value`."""

    attribute: str
    value: str


class Attribute(NamedTuple):
    """An attribute of a kind of subject: its name, the phrasings that state it (`{}` is the value), and its values."""

    name: str
    phrasings: tuple[str, ...]
    values: tuple[str, ...]

    def clauses(self, value: str) -> list[str]:
        """The clauses that state `value`, one per phrasing."""
        return [phrasing.format(value) for phrasing in self.phrasings]


@dataclass(frozen=True, slots=True)
class Subject:
    """A person or a craft.

    Attributes:
        name: The name, such as `Mira Keld` or `cheese`.
        kind: `person` or `craft`.
        opening: The words that begin the first sentence about it.
        continuation: The word that may begin later sentences: a pronoun, or `Then` for a craft.
        truth: Attribute → its true value.
    """

    name: str
    kind: str
    opening: str
    continuation: str
    truth: Mapping[str, str] = field(hash=False)

    def holds(self, fact: Fact) -> bool:
        """Whether `fact` is true for this subject."""
        return self.truth.get(fact.attribute) == fact.value


JOBS = "baker weaver miller smith painter tailor potter doctor judge teacher sailor mason brewer gardener cook hunter"
ANIMALS = "goats bees geese horses pigeons cats rabbits sheep ducks oxen dogs hens pigs mules doves snails"
CROPS = "plums beans barley apples onions hops pears roses wheat leeks figs grapes peas oats mint melons"
INSTRUMENTS = "flute fiddle harp drum horn lute organ bell piano cello whistle zither trumpet viola banjo gong"
ADJECTIVES = "Iron Silent Golden Broken Hidden Frozen Crooked Distant Burning Hollow Velvet Restless"
NOUNS = "Garden River Mirror Harvest Lantern Orchard Winter Bridge Kingdom Letter Harbour Shadow"
CRAFTS = "cheese bread cider soap rope jam beer paper glue butter wine ink felt vinegar varnish mustard"
MATERIALS = "milk flour ash straw bark honey salt clay sap wax"
TOOLS = "press kettle sieve barrel knife loom ladle pan hammer spindle"
WAITS = "one day|two days|three days|one week|two weeks|three weeks|one month|two months"
STORES = "cellar loft jar crate pantry barn bottle sack"


def tokenize(text: str) -> list[str]:
    """The tokens of a text."""
    return re.findall(TOKEN, text)


def detokenize(tokens: Sequence[str]) -> str:
    """The text of `tokens`: a space between tokens, but none before a punctuation mark, as in the tokenizer."""
    return re.sub(r" (?=[^\w\s])", "", " ".join(tokens))


def _names(rng: Random, *parts: str) -> list[str]:
    """All names composed of one piece from each of `parts` (pieces separated by spaces), in random order."""
    names = ["".join(pieces).capitalize() for pieces in itertools.product(*(part.split() for part in parts))]
    rng.shuffle(names)
    return names


def _person_attributes(rng: Random, people: Sequence[str]) -> tuple[Attribute, ...]:
    towns = tuple(_names(rng, "b d f h k l m n r s t v", "a e o u", "ld lm nn lk", "by ford holm mouth")[:16])
    works = [f"The {adjective} {noun}" for adjective in ADJECTIVES.split() for noun in NOUNS.split()]
    rng.shuffle(works)
    return (
        Attribute("birthplace", ("was born in {}", "comes from {}"), towns),
        Attribute("home", ("lives in {}", "has a house in {}"), towns),
        Attribute("job", ("works as a {}", "is a {}"), tuple(JOBS.split())),
        Attribute("work", ("wrote {}", "is known for {}"), tuple(works[: max(len(people), 2)])),
        Attribute("animal", ("keeps {}", "raises {}"), tuple(ANIMALS.split())),
        Attribute("crop", ("grows {}", "sells {}"), tuple(CROPS.split())),
        Attribute("instrument", ("plays the {}", "owns a {}"), tuple(INSTRUMENTS.split())),
        Attribute("teacher", ("studied with {}", "learned from {}"), tuple(people)),
    )


CRAFT_ATTRIBUTES = (
    Attribute("material", ("take {}", "start with {}"), tuple(MATERIALS.split())),
    Attribute("tool", ("use a {}", "work with a {}"), tuple(TOOLS.split())),
    Attribute("wait", ("wait {}", "let it rest for {}"), tuple(WAITS.split("|"))),
    Attribute("store", ("keep it in a {}", "store it in a {}"), tuple(STORES.split())),
)


class World:
    """People with eight attributes each and crafts with four, drawn at random from `seed`.

    First names are unique, so that a tiny model needs little capacity to identify a person. Values are shared between
    people, so that a true sentence about one person is a plausible false one about another.

    Attributes:
        attributes: Kind of subject → its attributes.
        people: The people; women and men alternate.
        crafts: The crafts.
        clauses: Clause → the kind of subject and the fact that it states.
        openings: The opening of a sentence, its tokens joined by spaces → the subject.

    Raises:
        ValueError: `people` is not in 2..144.
    """

    def __init__(self, seed: int, people: int) -> None:
        rng = Random(f"{seed}/world")
        onsets, vowels = "b d f g h k l m n r s t v", "a e i o u"
        # Women's first names end in "a" and men's in "o".
        women, men = (_names(rng, onsets, vowels, "r l n v s th", ending) for ending in "ao")
        families = _names(rng, onsets, vowels, "ld nn lk lm nd lt rv sk")
        if not 2 <= people <= 144:
            raise ValueError(f"people={people} is not allowed; allowed: 2 to 144")
        first = itertools.chain.from_iterable(zip(women, men, strict=True))
        names = [f"{name} {family}" for name, family in zip(itertools.islice(first, people), families, strict=False)]
        self.attributes = {"person": _person_attributes(rng, names), "craft": CRAFT_ATTRIBUTES}
        pronouns = itertools.cycle(("She", "He"))
        self.people = [
            Subject(name, "person", name, pronoun, self._draw_truth(rng, "person", name))
            for name, pronoun in zip(names, pronouns, strict=False)
        ]
        self.crafts = [
            Subject(name, "craft", f"To make {name},", "Then", self._draw_truth(rng, "craft", name))
            for name in CRAFTS.split()
        ]
        self.clauses = {
            " ".join(tokenize(clause)): (kind, Fact(attribute.name, value))
            for kind, attributes in self.attributes.items()
            for attribute in attributes
            for value in attribute.values
            for clause in attribute.clauses(value)
        }
        self.openings = {" ".join(tokenize(subject.opening)): subject for subject in self.people + self.crafts}

    def _draw_truth(self, rng: Random, kind: str, name: str) -> dict[str, str]:
        # A person is not his or her own teacher.
        return {
            attribute.name: rng.choice([value for value in attribute.values if value != name])
            for attribute in self.attributes[kind]
        }

    def attribute(self, subject: Subject, name: str) -> Attribute:
        """The attribute `name` of the subject's kind."""
        return next(attribute for attribute in self.attributes[subject.kind] if attribute.name == name)

    def others(self, subject: Subject) -> list[Subject]:
        """The other subjects of the same kind."""
        subjects = self.people if subject.kind == "person" else self.crafts
        return [other for other in subjects if other != subject]
