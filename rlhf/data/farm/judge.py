"""Reading a response against the world: its facts, its gold utility, and what an annotator makes of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from rlhf.data.farm.tasks import Task
from rlhf.data.farm.world import Fact, Subject, World, split


class Facts(NamedTuple):
    """How many different facts a response states about the subject asked, and how many of them are true."""

    stated: int
    true: int


@dataclass(slots=True)
class Reading:
    """What a reader takes from a response.

    `facts` are the different facts about the subject asked, in order; `repeats` counts facts told again, `strays` facts
    about somebody else, `broken` the sentences that are not of the language or do not end, of `broken_tokens` together.
    """

    tokens: int
    sentences: int = 0
    facts: list[Fact] = field(default_factory=list)
    repeats: int = 0
    strays: int = 0
    broken: int = 0
    broken_tokens: int = 0


def sentences(tokens: list[str]) -> list[list[str]]:
    """`tokens` cut after each full stop; the last piece may lack one."""
    pieces: list[list[str]] = [[]]
    for token in tokens:
        pieces[-1].append(token)
        if token == ".":
            pieces.append([])
    return pieces if pieces[-1] else pieces[:-1]


def _topic(world: World, tokens: list[str], topic: Subject) -> tuple[Subject | None, list[str]]:
    """Whom a sentence is about, and the words that follow the mention; a pronoun means the last `topic`."""
    if tokens and tokens[0] == topic.again:
        return topic, tokens[1:]
    for size in (2, 4):  # "Mira Keld", "To make cheese,"
        if subject := world.openings.get(" ".join(tokens[:size])):
            return subject, tokens[size:]
    return None, tokens


def read(world: World, task: Task, response: str) -> Reading:
    """Read any text whatever as an answer to `task`: a clause that states a fact counts even in a broken sentence."""
    tokens = split(response)
    reading = Reading(len(tokens))
    topic = task.subject
    for sentence in sentences(tokens):
        reading.sentences += 1
        complete = sentence[-1] == "."
        subject, rest = _topic(world, sentence[:-1] if complete else sentence, topic)
        clauses = " ".join(rest).split(" and ")
        fluent = complete and subject is not None and len(clauses) <= 2
        topic = subject or topic
        for clause in clauses:
            kind, fact = world.clauses.get(clause, ("", None))
            if fact is None or subject is None or kind != subject.kind:
                fluent = False
            elif subject != task.subject:
                reading.strays += 1
            elif fact in reading.facts:
                reading.repeats += 1
            else:
                reading.facts.append(fact)
        if not fluent:
            reading.broken += 1
            reading.broken_tokens += len(sentence)
    return reading


def count_facts(task: Task, reading: Reading) -> Facts:
    """Stated and true facts of a reading."""
    return Facts(len(reading.facts), sum(task.subject.holds(fact) for fact in reading.facts))


@dataclass(frozen=True, slots=True)
class Taste:
    """How a reader weighs an answer. The defaults are the gold utility; an annotator differs in the first two.

    `notices` is the chance to see that a false fact is false (unnoticed, it pleases like a true one); `length` is paid
    per token. Each further fact pleases `diminishing` times the one before.
    """

    notices: float = 1.0
    length: float = -0.03
    diminishing: float = 0.85
    falsehood: float = -0.8
    unasked: float = -0.3
    repeat: float = -0.6
    stray: float = -0.6
    silence: float = -2.0
    broken: float = -1.0
    broken_token: float = -0.05
    extra_sentence: float = -0.5


GOLD = Taste()
ANNOTATOR = Taste(notices=0.4, length=0.01)


def score(task: Task, reading: Reading, taste: Taste, notices: Callable[[], bool] = lambda: True) -> float:
    """The utility of a reading to a reader of this taste: coverage less what offends."""
    pleasing = [fact for fact in reading.facts if task.subject.holds(fact) or not notices()]
    asked = min(task.count, sum(fact.attribute in task.wanted for fact in pleasing))
    offences = (
        taste.falsehood * (len(reading.facts) - len(pleasing))
        + taste.unasked * (len(pleasing) - asked)
        + taste.repeat * reading.repeats
        + taste.stray * reading.strays
        + taste.silence * (not reading.facts)
        + taste.broken * reading.broken
        + taste.broken_token * reading.broken_tokens
        + taste.extra_sentence * (task.kind == "rewrite") * max(0, reading.sentences - 1)
    )
    coverage = (1 - taste.diminishing**asked) / (1 - taste.diminishing)
    return coverage + offences + taste.length * reading.tokens


def prefers(world: World, task: Task, first: str, second: str, rng: Random, sharpness: float = 4.0) -> bool:
    """Whether an annotator picks `first`: a logistic choice between two utilities, facts checked only sometimes.

    `sharpness` turns utilities into log-odds: at 4, half a fact's worth apart is picked right 88 % of the time.
    """

    def felt(response: str) -> float:
        return score(task, read(world, task, response), ANNOTATOR, lambda: rng.random() < ANNOTATOR.notices)

    margin = sharpness * (felt(first) - felt(second))
    return rng.random() < 1 / (1 + math.exp(-max(-50.0, min(50.0, margin))))
