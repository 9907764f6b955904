"""A question with its answers and pairs of answers, and the counts of the rows that threads were made from."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rlhf.data.reports import SHOWN, skipped_line
from rlhf.errors import RowError


@dataclass(frozen=True, slots=True)
class Thread:
    """A question and its answers.

    Attributes:
        id: Identifies the question within its source.
        question: The question as Markdown.
        answers: The answers, the best first.
        better: Indices into `answers`; `better[k]` is preferred to `worse[k]`.
        worse: Indices into `answers`, as many as in `better`.
    """

    id: str
    question: str
    answers: list[str]
    better: list[int]
    worse: list[int]


@dataclass(frozen=True)
class Pairing:
    """How pairs of answers are drawn, and whether a question includes its title.

    Attributes:
        limit: Most pairs per question.
        seed: Selects the pairs.
        title: Whether a question's title is put above its text.
    """

    limit: int = 10
    seed: int = 0
    title: bool = False

    def draw(self, pairs: Sequence[tuple[int, int]], key: str) -> tuple[list[int], list[int]]:
        """Draw at most `limit` of the (better, worse) `pairs` without replacement.

        The draw depends on the seed and the question's `key` only, not on other questions.

        Returns:
            The better and the worse answers of the pairs drawn.
        """
        drawn = random.Random(f"{self.seed}/{key}").sample(pairs, min(self.limit, len(pairs)))
        return [better for better, _ in drawn], [worse for _, worse in drawn]


@dataclass
class Tally:
    """Counts of the rows of one source.

    Attributes:
        rows: Rows read.
        questions: Threads made.
        answers: Answers in these threads.
        pairs: Pairs drawn in these threads.
        other: Rows that are neither a question nor an answer.
        skipped: Reason → number of bad rows.
        first: Reason → numbers of the first bad rows, at most `SHOWN`.
    """

    rows: int = 0
    questions: int = 0
    answers: int = 0
    pairs: int = 0
    other: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[int]] = field(default_factory=dict)

    def skip(self, row: int, reason: RowError | str) -> None:
        """Count a bad row. Memory is bounded: only the first few row numbers are kept."""
        self.skipped[str(reason)] = self.skipped.get(str(reason), 0) + 1
        # Bad rows do not come in the order of their numbers, because some are found only when threads are made.
        self.first[str(reason)] = sorted([*self.first.get(str(reason), []), row])[:SHOWN]


@dataclass(frozen=True)
class ThreadReport:
    """What became of the rows: source name → its `Tally`."""

    tallies: Mapping[str, Tally]

    @property
    def counts(self) -> dict[str, int]:
        """Number of skipped rows by reason, the most frequent first, as in a stage's summary."""
        counts: Counter[str] = Counter()
        for tally in self.tallies.values():
            counts.update(tally.skipped)
        return dict(counts.most_common())

    def lines(self) -> list[str]:
        """One line per source and reason, with the first row numbers, for the log."""
        return [
            skipped_line(name, count, tally.rows, reason, tally.first[reason])
            for name, tally in self.tallies.items()
            for reason, count in tally.skipped.items()
        ]


def make_thread(
    id: str, question: str, answers: list[str], pairs: list[tuple[int, int]], tally: Tally, pairing: Pairing
) -> Thread:
    """Make a thread with pairs drawn from those of `pairs` whose texts differ, and count it in `tally`.

    `pairs` are (better, worse) indices into `answers`.
    """
    different = [(better, worse) for better, worse in pairs if answers[better] != answers[worse]]
    better, worse = pairing.draw(different, id)
    tally.questions += 1
    tally.answers += len(answers)
    tally.pairs += len(better)
    return Thread(id, question, answers, better, worse)
