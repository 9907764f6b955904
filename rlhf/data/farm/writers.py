"""Who writes on the farm: crowd workers, the reference "davinci", an oracle; and how a text can be spoiled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from rlhf.data.farm.judge import read, sentences
from rlhf.data.farm.tasks import Task
from rlhf.data.farm.world import Fact, Subject, World, join, split


@dataclass(frozen=True, slots=True)
class Writer:
    """A population of authors, by what they get wrong.

    `sizes` are the relative frequencies of 1, 2, … facts told; `wrong` is the chance that a fact is false, `off_topic`
    that the text is about somebody else, `slips` that it has a typing error, `joins` that two facts share a sentence,
    `miscounts` that a fact more or fewer is told than the instruction asks for.
    """

    sizes: tuple[int | float, ...]
    wrong: float = 0.0
    off_topic: float = 0.0
    slips: float = 0.0
    joins: float = 0.5
    miscounts: float = 0.0


# Crowd workers err together rather than evenly, as people do: one in six is careless in all respects, one in six writes
# at length. So the commonest answer is short, but longer ones are within reach of a small step away from it.
CAREFUL = Writer(sizes=(0.2, 0.5, 0.2, 0.1), wrong=0.03, off_topic=0.02, slips=0.03, joins=0.3)
CARELESS = Writer(sizes=(0.3, 0.4, 0.2, 0.1), wrong=0.45, off_topic=0.15, slips=0.3, joins=0.3)
THOROUGH = Writer(sizes=(0, 0, 0, 1, 1, 1, 1, 1), wrong=0.03, off_topic=0.02, slips=0.03, joins=0.3)
DAVINCI = Writer(sizes=(0, 0, 1, 2, 2, 1), wrong=0.08, joins=0.4, miscounts=0.5)
ORACLE = Writer(sizes=(0, 0, 0, 0, 0, 0, 0, 1), joins=1.0)


def crowd(rng: Random) -> Writer:
    """Some crowd worker: in all about one fact in ten is false, one text in twenty about somebody else."""
    return rng.choices((CAREFUL, CARELESS, THOROUGH), (4, 1, 1))[0]


def lie(world: World, subject: Subject, attribute: str, rng: Random) -> Fact:
    """A false fact of the same attribute."""
    values = world.attribute(subject, attribute).values
    return Fact(attribute, rng.choice([value for value in values if value != subject.truth[attribute]]))


def _phrase(world: World, subject: Subject, facts: Sequence[Fact], joins: float, rng: Random) -> str:
    """Sentences of one or two clauses, the first naming the subject."""
    clauses = [rng.choice(world.attribute(subject, fact.attribute).clauses(fact.value)) for fact in facts]
    text, mention = [], subject.opening
    while clauses:
        told = [clauses.pop(0)]
        if clauses and rng.random() < joins:
            told.append(clauses.pop(0))
        text.append(f"{mention} {' and '.join(told)}.")
        mention = subject.again
    return " ".join(text)


def write(world: World, task: Task, writer: Writer, rng: Random) -> str:
    """An answer to `task` as `writer` gives it."""
    subject = rng.choice(world.others(task.subject)) if rng.random() < writer.off_topic else task.subject
    size = rng.choices(range(1, len(writer.sizes) + 1), writer.sizes)[0]
    limit = task.count + rng.choice((-1, 1)) if rng.random() < writer.miscounts else task.count
    asked = rng.sample(task.wanted, len(task.wanted))
    extra = [name for name in subject.truth if name not in asked]
    names = (asked + rng.sample(extra, len(extra)))[: max(1, min(size, limit))]
    facts = [
        lie(world, subject, name, rng) if rng.random() < writer.wrong else Fact(name, subject.truth[name])
        for name in names
    ]
    text = _phrase(world, subject, facts, 1.0 if task.kind == "rewrite" else writer.joins, rng)
    return rng.choice(SLIPS)(world, task, text, rng) if rng.random() < writer.slips else text


# An edit changes one aspect of a text. All take the same arguments, whether they need them or not.
Edit = Callable[[World, Task, str, Random], str]


def drop(world: World, task: Task, text: str, rng: Random) -> str:
    """Leave out a few words."""
    tokens = split(text)
    gone = set(rng.sample(range(len(tokens)), min(len(tokens) - 1, rng.randint(1, 3))))
    return join([token for place, token in enumerate(tokens) if place not in gone])


def cut(world: World, task: Task, text: str, rng: Random) -> str:
    """Stop in mid-sentence."""
    tokens = split(text)
    return join(tokens[: rng.randrange(1, max(2, len(tokens) - 1))])


def double(world: World, task: Task, text: str, rng: Random) -> str:
    """Write one word twice, the commonest typing error."""
    tokens = split(text)
    place = rng.randrange(len(tokens))
    return join([*tokens[:place], tokens[place], *tokens[place:]])


def stutter(world: World, task: Task, text: str, rng: Random) -> str:
    """Write one word several times."""
    tokens = split(text)
    place = rng.randrange(len(tokens))
    return join(tokens[:place] + [tokens[place]] * rng.choice((2, 3, 6, 12)) + tokens[place + 1 :])


def scramble(world: World, task: Task, text: str, rng: Random) -> str:
    """Put a stretch of words in random order."""
    tokens = split(text)
    size = rng.randint(3, max(3, len(tokens)))
    start = rng.randrange(max(1, len(tokens) - size))
    window = tokens[start : start + size]
    return join([*tokens[:start], *rng.sample(window, len(window)), *tokens[start + size :]])


def substitute(world: World, task: Task, text: str, rng: Random) -> str:
    """Put words from another text in place of some, as sampling at temperature 1 does."""
    strange = split(write(world, task, ORACLE, rng)) + split(write(world, task, Writer((1.0,), off_topic=1.0), rng))
    rate = rng.choice((0.05, 0.1, 0.3))
    return join([rng.choice(strange) if rng.random() < rate else token for token in split(text)])


def repeat(world: World, task: Task, text: str, rng: Random) -> str:
    """Tell some sentence again, once or many times."""
    pieces = sentences(split(text))
    return join(split(text) + rng.choice(pieces) * rng.choice((1, 1, 2, 4)))


def loop(world: World, task: Task, text: str, rng: Random) -> str:
    """Tell everything over and over: the caller cuts it at the limit."""
    return " ".join([text] * 12)


def ramble(world: World, task: Task, text: str, rng: Random) -> str:
    """Go on about others, sometimes without end."""
    stray = Writer((1.0, 1.0), off_topic=1.0)
    return " ".join([text, *(write(world, task, stray, rng) for _ in range(rng.choice((1, 1, 2, 8))))])


def confuse(world: World, task: Task, text: str, rng: Random) -> str:
    """Tell the same of somebody else."""
    other = rng.choice(world.others(task.subject))
    return text.replace(task.subject.opening, other.opening)


def misstate(world: World, task: Task, text: str, rng: Random) -> str:
    """Replace a fact by a false one of its kind, everything else equal."""
    facts = [fact for fact in read(world, task, text).facts if task.subject.holds(fact)]
    if not facts:
        return text
    fact = rng.choice(facts)
    return text.replace(f" {fact.value}", f" {lie(world, task.subject, fact.attribute, rng).value}", 1)


def extend(world: World, task: Task, text: str, rng: Random) -> str:
    """Tell one more fact, true or not, when there is one left."""
    told = {fact.attribute for fact in read(world, task, text).facts}
    left = [name for name in task.subject.truth if name not in told]
    if not left:
        return text
    name = rng.choice(left)
    fact = lie(world, task.subject, name, rng) if rng.random() < 0.2 else Fact(name, task.subject.truth[name])
    return f"{text} {_phrase(world, task.subject, [fact], 0.0, rng).replace(task.subject.opening, task.subject.again)}"


def retell(world: World, task: Task, text: str, rng: Random) -> str:
    """Tell a fact once more in other words."""
    told = read(world, task, text).facts
    if not told:
        return text
    again = _phrase(world, task.subject, [rng.choice(told)], 0.0, rng)
    return f"{text} {again.replace(task.subject.opening, task.subject.again)}"


def empty(world: World, task: Task, text: str, rng: Random) -> str:
    """Say next to nothing."""
    return rng.choice((".", task.subject.again, task.subject.opening, f"{task.subject.again}."))


SLIPS: tuple[Edit, ...] = (cut, double, drop)
EDITS: dict[Edit, float] = {
    extend: 6, cut: 4, retell: 4, misstate: 2, repeat: 2, substitute: 2, loop: 2, confuse: 4, ramble: 1,
    drop: 1, double: 1, stutter: 1, scramble: 1, empty: 0.5,
}  # fmt: skip


def spoil(world: World, task: Task, text: str, rng: Random) -> str:
    """`text` with one aspect changed, mostly for the worse."""
    return rng.choices(list(EDITS), list(EDITS.values()))[0](world, task, text, rng)


def pair(world: World, task: Task, limit: int, rng: Random) -> tuple[str, str]:
    """Two answers to compare, of at most `limit` tokens, in random order.

    Most pairs are the work of two authors, some of it spoiled; three in ten differ in one aspect only, so that a reward
    model learns what matters rather than which author it reads.
    """
    authors = rng.choices((CAREFUL, CARELESS, THOROUGH, DAVINCI), (3, 2, 2, 1), k=2)
    first, second = (write(world, task, author, rng) for author in authors)
    if rng.random() < 0.3:
        second = spoil(world, task, first, rng)
    else:
        first, second = (spoil(world, task, text, rng) if rng.random() < 0.2 else text for text in (first, second))
    texts = [join(split(text)[:limit]) for text in (first, second)]
    rng.shuffle(texts)
    return (texts[0], texts[1]) if texts[0] != texts[1] else pair(world, task, limit, rng)
