"""The instructions of the farm: bios, lists, rewriting and how-tos, each about one subject."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from rlhf.data.farm.world import Subject, World
from rlhf.errors import DataError

BIOS = (
    "Tell me a bio of {}.",
    "Tell me about {}.",
    "Write a bio of {}.",
    "Who is {}?",
    "Describe {}.",
    "Introduce {}.",
    "What do you know about {}?",
    "Present {} to me.",
    "Write about {}.",
    "Say who {} is.",
)
LISTS = ("List {} facts about {}.", "Give me {} facts about {}.")
COUNTS = {"two": 2, "three": 3, "four": 4, "five": 5}
HOW_TOS = (
    "How do I make {}?",
    "Explain how to make {}.",
    "Tell me how to make {}.",
    "What is the way to make {}?",
    "Describe how to make {}.",
)
REWRITES = "Rewrite in one sentence: {} {}. {} {}."
# The share of each kind of task in a split.
SHARES = {"bio": 0.55, "list": 0.25, "rewrite": 0.1, "how-to": 0.1}


@dataclass(frozen=True, slots=True)
class Task:
    """An instruction and what a response to it should contain.

    Attributes:
        kind: `bio`, `list`, `rewrite` or `how-to`.
        instruction: The text of the instruction.
        subject: The person or craft that it is about.
        wanted: The attributes that the response may state.
        count: How many facts about them the response should state.
    """

    kind: str
    instruction: str
    subject: Subject
    wanted: tuple[str, ...]
    count: int

    @property
    def prompt(self) -> str:
        """The templated text that a model reads: the instruction and a line break."""
        return self.instruction + "\n"


def _people_tasks(world: World) -> Iterator[Task]:
    names = tuple(attribute.name for attribute in world.attributes["person"])
    for subject in world.people:
        for text in BIOS:
            yield Task("bio", text.format(subject.name), subject, names, len(names))
        for text, (word, count) in itertools.product(LISTS, COUNTS.items()):
            yield Task("list", text.format(word, subject.name), subject, names, count)
        for pair in itertools.combinations(names, 2):
            first, second = (world.attribute(subject, name).clauses(subject.truth[name])[0] for name in pair)
            text = REWRITES.format(subject.opening, first, subject.continuation, second)
            yield Task("rewrite", text, subject, pair, 2)


def _craft_tasks(world: World) -> Iterator[Task]:
    names = tuple(attribute.name for attribute in world.attributes["craft"])
    for subject, text in itertools.product(world.crafts, HOW_TOS):
        yield Task("how-to", text.format(subject.name), subject, names, len(names))


class Tasks:
    """All tasks of a world, divided by instruction into three parts.

    A quarter of each kind is for `eval`, an eighth for the validation splits and the rest for training (`sft`,
    `preference` and `prompts`, which share these instructions). So no evaluated instruction was trained on. Subjects
    and phrasings do occur in several parts, and only their combinations are new: a model this small can only know
    subjects that it was trained on.

    Demonstrations are about people in proportion to their fame: the weight of the person at rank k is 1 / k^`fame`.

    Raises:
        ValueError: `fame` is negative or not finite.
    """

    def __init__(self, world: World, seed: int, fame: float) -> None:
        if not 0 <= fame < math.inf:
            raise ValueError(f"fame={fame} is not allowed; allowed: a number of at least 0")
        tasks = [*_people_tasks(world), *_craft_tasks(world)]
        self.by_instruction = {task.instruction: task for task in tasks}
        self.parts: dict[str, dict[str, list[Task]]] = {"eval": {}, "validation": {}, "train": {}}
        rng = Random(f"{seed}/tasks")
        for kind in SHARES:
            pool = [task for task in tasks if task.kind == kind]
            rng.shuffle(pool)
            eval_end, validation_end = len(pool) // 4, len(pool) // 4 + len(pool) // 8
            self.parts["eval"][kind] = pool[:eval_end]
            self.parts["validation"][kind] = pool[eval_end:validation_end]
            self.parts["train"][kind] = pool[validation_end:]
        self.rank = {subject: rank for rank, subject in enumerate(world.people, 1)}
        self.fame = fame

    def sample(self, part: str, rng: Random, count: int, by_fame: bool = False) -> list[Task]:
        """Sample `count` tasks of `part` with replacement; the kind of each is drawn by `SHARES`.

        Within a kind all tasks are equally likely, or with `by_fame` as their subjects are famous. Crafts are alike.
        """
        kinds = rng.choices(list(SHARES), list(SHARES.values()), k=count)
        fame = self.fame if by_fame else 0.0
        if not fame:
            return [rng.choice(self.parts[part][kind]) for kind in kinds]
        cumulative = {
            kind: list(itertools.accumulate(self.rank.get(task.subject, 1) ** -fame for task in tasks))
            for kind, tasks in self.parts[part].items()
        }
        return [rng.choices(self.parts[part][kind], cum_weights=cumulative[kind])[0] for kind in kinds]

    def sample_distinct(self, part: str, rng: Random, count: int) -> list[Task]:
        """Sample `count` tasks of `part` without replacement; the number of each kind is its share, rounded down.

        The rest are bios.

        Raises:
            DataError: `part` has too few tasks of some kind.
        """
        quotas = {kind: int(share * count) for kind, share in SHARES.items()}
        quotas["bio"] += count - sum(quotas.values())
        for kind, quota in quotas.items():
            if quota > (available := len(self.parts[part][kind])):
                raise DataError(
                    f"{count} different prompts need {quota} of kind {kind!r}, but {part!r} has only {available}"
                )
        chosen = [task for kind, quota in quotas.items() for task in rng.sample(self.parts[part][kind], quota)]
        rng.shuffle(chosen)
        return chosen
