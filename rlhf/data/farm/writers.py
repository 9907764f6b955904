"""Simulated writers (crowd workers, the reference "davinci", an oracle) and edits that spoil a response."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from rlhf.data.farm.judge import analyze, split_sentences
from rlhf.data.farm.tasks import Task
from rlhf.data.farm.world import Fact, Subject, World, detokenize, tokenize
from rlhf.errors import DataError

ATTEMPTS = 200  # to write responses that differ; a few are enough unless they are cut very short


@dataclass(frozen=True, slots=True)
class Writer:
    """A population of writers, described by how much they write and how often they err.

    Attributes:
        count_weights: Relative frequencies of 1, 2, … facts in a response.
        false_rate: Probability that a fact is false.
        off_topic_rate: Probability that a response is about another subject.
        typo_rate: Probability that a response has a typing error.
        join_rate: Probability that two facts share a sentence.
        miscount_rate: Probability that the writer aims at one fact more or one fewer than the instruction asks for.
    """

    count_weights: tuple[int | float, ...]
    false_rate: float = 0.0
    off_topic_rate: float = 0.0
    typo_rate: float = 0.0
    join_rate: float = 0.5
    miscount_rate: float = 0.0


# The errors of crowd workers are correlated, as those of people are: one worker in six is careless in every respect,
# and one in six writes at length. So the most common response is short, but longer ones are within reach of a small
# step of the policy.
CAREFUL = Writer((0.2, 0.5, 0.2, 0.1), false_rate=0.03, off_topic_rate=0.02, typo_rate=0.03, join_rate=0.3)
CARELESS = Writer((0.3, 0.4, 0.2, 0.1), false_rate=0.45, off_topic_rate=0.15, typo_rate=0.3, join_rate=0.3)
THOROUGH = Writer((0, 0, 0, 1, 1, 1, 1, 1), false_rate=0.03, off_topic_rate=0.02, typo_rate=0.03, join_rate=0.3)
DAVINCI = Writer((0, 0, 1, 2, 2, 1), false_rate=0.08, join_rate=0.4, miscount_rate=0.5)
ORACLE = Writer((0, 0, 0, 0, 0, 0, 0, 1), join_rate=1.0)


def sample_crowd_worker(rng: Random) -> Writer:
    """A random crowd worker. Overall about one fact in ten is false and one text in twenty is off topic."""
    return rng.choices((CAREFUL, CARELESS, THOROUGH), (4, 1, 1))[0]


def false_fact(world: World, subject: Subject, attribute: str, rng: Random) -> Fact:
    """A random false value of an attribute of `subject`."""
    values = world.attribute(subject, attribute).values
    return Fact(attribute, rng.choice([value for value in values if value != subject.truth[attribute]]))


def _to_text(world: World, subject: Subject, facts: Sequence[Fact], join_rate: float, rng: Random) -> str:
    """Sentences of one or two facts each; the first sentence begins with the subject's opening."""
    clauses = [rng.choice(world.attribute(subject, fact.attribute).clauses(fact.value)) for fact in facts]
    text, mention = [], subject.opening
    while clauses:
        sentence = [clauses.pop(0)]
        if clauses and rng.random() < join_rate:
            sentence.append(clauses.pop(0))
        text.append(f"{mention} {' and '.join(sentence)}.")
        mention = subject.continuation
    return " ".join(text)


def write_response(world: World, task: Task, writer: Writer, rng: Random) -> str:
    """A response to `task` by `writer`."""
    # 1. Choose the subject and the number of facts.
    subject = rng.choice(world.others(task.subject)) if rng.random() < writer.off_topic_rate else task.subject
    size = rng.choices(range(1, len(writer.count_weights) + 1), writer.count_weights)[0]
    limit = task.count + rng.choice((-1, 1)) if rng.random() < writer.miscount_rate else task.count
    # 2. Choose the attributes: those asked for first, then others.
    wanted = rng.sample(task.wanted, len(task.wanted))
    others = [name for name in subject.truth if name not in wanted]
    names = (wanted + rng.sample(others, len(others)))[: max(1, min(size, limit))]
    # 3. State a true or false fact about each.
    facts = [
        false_fact(world, subject, name, rng) if rng.random() < writer.false_rate else Fact(name, subject.truth[name])
        for name in names
    ]
    text = _to_text(world, subject, facts, 1.0 if task.kind == "rewrite" else writer.join_rate, rng)
    # 4. Perhaps mistype it.
    return rng.choice(TYPOS)(world, task, text, rng) if rng.random() < writer.typo_rate else text


# An edit changes one aspect of a text. All edits have the same signature, whether they use the arguments or not.
Edit = Callable[[World, Task, str, Random], str]


def drop_words(world: World, task: Task, text: str, rng: Random) -> str:
    """Leave out one to three tokens."""
    tokens = tokenize(text)
    dropped = set(rng.sample(range(len(tokens)), min(len(tokens) - 1, rng.randint(1, 3))))
    return detokenize([token for place, token in enumerate(tokens) if place not in dropped])


def truncate(world: World, task: Task, text: str, rng: Random) -> str:
    """Cut the text off at a random token."""
    tokens = tokenize(text)
    return detokenize(tokens[: rng.randrange(1, max(2, len(tokens) - 1))])


def double_word(world: World, task: Task, text: str, rng: Random) -> str:
    """Write one token twice, the most common typing error."""
    tokens = tokenize(text)
    place = rng.randrange(len(tokens))
    return detokenize([*tokens[:place], tokens[place], *tokens[place:]])


def stutter(world: World, task: Task, text: str, rng: Random) -> str:
    """Write one token 2, 3, 6 or 12 times."""
    tokens = tokenize(text)
    place = rng.randrange(len(tokens))
    return detokenize(tokens[:place] + [tokens[place]] * rng.choice((2, 3, 6, 12)) + tokens[place + 1 :])


def shuffle_words(world: World, task: Task, text: str, rng: Random) -> str:
    """Shuffle a window of at least three tokens."""
    tokens = tokenize(text)
    size = rng.randint(3, max(3, len(tokens)))
    start = rng.randrange(max(1, len(tokens) - size))
    window = tokens[start : start + size]
    return detokenize([*tokens[:start], *rng.sample(window, len(window)), *tokens[start + size :]])


def substitute_words(world: World, task: Task, text: str, rng: Random) -> str:
    """Replace some tokens by tokens of other texts, as sampling at temperature 1 does."""
    other_texts = (ORACLE, Writer((1.0,), off_topic_rate=1.0))
    pool = [token for writer in other_texts for token in tokenize(write_response(world, task, writer, rng))]
    rate = rng.choice((0.05, 0.1, 0.3))
    return detokenize([rng.choice(pool) if rng.random() < rate else token for token in tokenize(text)])


def repeat_sentence(world: World, task: Task, text: str, rng: Random) -> str:
    """Append one sentence of the text again, once or several times."""
    sentences = split_sentences(tokenize(text))
    return detokenize(tokenize(text) + rng.choice(sentences) * rng.choice((1, 1, 2, 4)))


def loop(world: World, task: Task, text: str, rng: Random) -> str:
    """Repeat the whole text 12 times; the caller truncates it to the length limit."""
    return " ".join([text] * 12)


def ramble(world: World, task: Task, text: str, rng: Random) -> str:
    """Append one to eight texts about other subjects."""
    stray = Writer((1.0, 1.0), off_topic_rate=1.0)
    return " ".join([text, *(write_response(world, task, stray, rng) for _ in range(rng.choice((1, 1, 2, 8))))])


def change_subject(world: World, task: Task, text: str, rng: Random) -> str:
    """State the same facts about another subject."""
    other = rng.choice(world.others(task.subject))
    return text.replace(task.subject.opening, other.opening)


def falsify_fact(world: World, task: Task, text: str, rng: Random) -> str:
    """Replace one true fact by a false one about the same attribute; the rest of the text stays as it is."""
    true_facts = [fact for fact in analyze(world, task, text).facts if task.subject.holds(fact)]
    if not true_facts:
        return text
    fact = rng.choice(true_facts)
    false = false_fact(world, task.subject, fact.attribute, rng)
    return text.replace(f" {fact.value}", f" {false.value}", 1)


def add_fact(world: World, task: Task, text: str, rng: Random) -> str:
    """State one more attribute, if there is one left; the fact is false with probability 0.2."""
    stated = {fact.attribute for fact in analyze(world, task, text).facts}
    left = [name for name in task.subject.truth if name not in stated]
    if not left:
        return text
    name = rng.choice(left)
    is_false = rng.random() < 0.2
    fact = false_fact(world, task.subject, name, rng) if is_false else Fact(name, task.subject.truth[name])
    return f"{text} {_continuation(world, task.subject, fact, rng)}"


def restate_fact(world: World, task: Task, text: str, rng: Random) -> str:
    """State one fact of the text again, perhaps in other words."""
    stated = analyze(world, task, text).facts
    if not stated:
        return text
    return f"{text} {_continuation(world, task.subject, rng.choice(stated), rng)}"


def _continuation(world: World, subject: Subject, fact: Fact, rng: Random) -> str:
    """One sentence that continues a text about `subject`."""
    return _to_text(world, subject, [fact], 0.0, rng).replace(subject.opening, subject.continuation)


def say_nothing(world: World, task: Task, text: str, rng: Random) -> str:
    """Write a full stop, a mention of the subject or a pronoun, and no fact."""
    subject = task.subject
    return rng.choice((".", subject.continuation, subject.opening, f"{subject.continuation}."))


TYPOS: tuple[Edit, ...] = (truncate, double_word, drop_words)
# The relative frequency of each edit. The order is part of the data: a seed selects edits by their position.
EDITS: dict[Edit, float] = {
    add_fact: 6, truncate: 4, restate_fact: 4, falsify_fact: 2, repeat_sentence: 2, substitute_words: 2, loop: 2,
    change_subject: 4, ramble: 1, drop_words: 1, double_word: 1, stutter: 1, shuffle_words: 1, say_nothing: 0.5,
}  # fmt: skip

# Training comparisons hold more of what is hard to learn: whether a fact is new. A reward model that cannot tell makes
# a policy repeat itself.
TRAINING_EDITS = EDITS | {add_fact: 9, restate_fact: 12, repeat_sentence: 6}


def random_edit(rng: Random, edits: Mapping[Edit, float] = EDITS) -> Edit:
    """A random edit; most of them make most texts worse."""
    return rng.choices(list(edits), list(edits.values()))[0]


def write_responses(
    world: World, task: Task, count: int, max_tokens: int, rng: Random
) -> tuple[list[str], list[tuple[int, int]]]:
    """`count` different responses to compare with each other, each of at most `max_tokens` tokens.

    And the places of each response and the edit of it, as pairs.

    Each response is followed by an edit of it. The two differ in one aspect only, so that a reward model learns what
    makes a response better and not only which writer it is by.

    Raises:
        DataError: there are hardly so many different ones of that length.
    """
    texts: list[str] = []
    edits: list[tuple[int, int]] = []
    for _ in range(ATTEMPTS):
        response = write_response(world, task, _annotated_writer(rng), rng)
        before = len(texts)
        for text in (response, random_edit(rng, TRAINING_EDITS)(world, task, response, rng)):
            cut = detokenize(tokenize(text)[:max_tokens])
            texts += [cut] * (cut not in texts)
        edits += [(before, before + 1)] * (before + 2 == len(texts) <= count)
        if len(texts) >= count:
            return texts[:count], edits
    raise _too_short(task, max_tokens, f"{count} different responses")


def _annotated_writer(rng: Random) -> Writer:
    """A random writer of responses that are compared."""
    return rng.choices((CAREFUL, CARELESS, THOROUGH, DAVINCI), (3, 2, 2, 1))[0]


class Pair(NamedTuple):
    """Two responses to compare, and how they differ: the name of an edit, `writers`, or `writers_and_edits`."""

    first: str
    second: str
    kind: str


def write_pair(world: World, task: Task, max_tokens: int, rng: Random) -> Pair:
    """Two different responses to compare, each of at most `max_tokens` tokens, in random order.

    In 70 % of the pairs each response has its own writer and is edited with probability 0.2. In the other 30 % the
    second response is an edit of the first.

    Raises:
        DataError: there are hardly two different responses of that length.
    """
    for _ in range(ATTEMPTS):
        texts, kind = _draw_pair(world, task, max_tokens, rng)
        if texts[0] != texts[1]:
            return Pair(texts[0], texts[1], kind)
    raise _too_short(task, max_tokens, "two different responses")


def _draw_pair(world: World, task: Task, max_tokens: int, rng: Random) -> tuple[list[str], str]:
    """Two responses, which may be the same, and how they differ."""
    writers = [_annotated_writer(rng) for _ in range(2)]
    first, second = (write_response(world, task, writer, rng) for writer in writers)
    if rng.random() < 0.3:
        edit = random_edit(rng)
        second, kind = edit(world, task, first, rng), edit.__name__
    else:
        texts = [random_edit(rng)(world, task, text, rng) if rng.random() < 0.2 else text for text in (first, second)]
        kind = "writers" if texts == [first, second] else "writers_and_edits"
        first, second = texts
    texts = [detokenize(tokenize(text)[:max_tokens]) for text in (first, second)]
    rng.shuffle(texts)
    return texts, kind


def _too_short(task: Task, max_tokens: int, wanted: str) -> DataError:
    """What to raise if texts cut to `max_tokens` do not differ."""
    return DataError(
        f"data.max_response_tokens={max_tokens}: {ATTEMPTS} attempts did not give {wanted} to"
        f" “{task.instruction}”; allowed: responses long enough to differ (the default is 48)"
    )
