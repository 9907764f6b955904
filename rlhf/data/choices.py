"""Which of several answers to a prompt is the better one: by an annotator's choice, by scores or by ranks."""

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from rlhf.data.column_maps import Row
from rlhf.data.options import parse_choice
from rlhf.errors import DataError, RowError

Ties = Literal["skip", "first", "random"]
Pair = tuple[int, int, float | None]
"""Indices of the better and the worse answer, and the difference of their scores, if there are scores."""


@dataclass(frozen=True)
class Choosing:
    """How pairs are made from annotations.

    Attributes:
        choices: Value of `preference` in small letters → 0 (the first answer), 1 (the second) or None (a tie); if it is
            None, the value is a number from 1 (the first) to 2 (the second), and 0 and 1.5 are ties.
        ties: Whether equal answers are no pair, a pair whose first one is the better, or one drawn from the texts.
        min_margin: Least difference of two scores.
        seed: Selects the order of drawn ties.
    """

    choices: Mapping[str, int | None] | None = None
    ties: Ties = "skip"
    min_margin: float = 0.0
    seed: int = 0

    @classmethod
    def parse(cls, choices: Any, ties: Any, min_margin: float, seed: int) -> "Choosing":
        """Parse the values of a configuration.

        Raises:
            DataError: a value that is not allowed.
        """
        ties = parse_choice(ties, Ties, "ties")
        if not 0 <= min_margin < math.inf:
            raise DataError(f"data.min_margin={min_margin!r} is not allowed; allowed: a number from 0.")
        return cls(_parse_choices(choices), ties, min_margin, seed)

    def by_preference(self, row: Row, answers: Sequence[str]) -> list[Pair]:
        """The pair of two answers by the row's `preference`, or by the majority of several that are not null.

        Raises:
            RowError: a tie that is to be skipped, or a value that is not allowed.
        """
        name, value = row.column("preference"), row.get("preference")
        votes = [vote for vote in (value if isinstance(value, list) else [value]) if vote is not None]
        if not votes:
            raise RowError(f"no `{name}`")
        counts = Counter(self._chosen(vote, name) for vote in votes)
        if counts[0] != counts[1]:
            better = 0 if counts[0] > counts[1] else 1
            return [(better, 1 - better, None)]
        if self.ties == "skip":
            raise RowError(f"`{name}` is a tie")
        return [(*self._ordered(0, 1, answers), None)]

    def by_scores(self, scores: Sequence[float], answers: Sequence[str]) -> list[Pair]:
        """The pairs of all answers whose scores differ by `min_margin` or more, and ties if they are to be kept.

        Raises:
            RowError: there is no such pair.
        """
        pairs: list[Pair] = []
        for i, j in combinations(range(len(answers)), 2):
            margin = abs(scores[i] - scores[j])
            if margin >= self.min_margin and margin > 0:
                pairs.append((i, j, margin) if scores[i] > scores[j] else (j, i, margin))
            elif margin == 0 == self.min_margin and self.ties != "skip":
                pairs.append((*self._ordered(i, j, answers), margin))
        if not pairs:
            raise RowError("no two answers have different scores" if not self.min_margin else
                           f"no two answers have scores that differ by {self.min_margin:g}")  # fmt: skip
        return pairs

    def _ordered(self, i: int, j: int, answers: Sequence[str]) -> tuple[int, int]:
        swapped = self.ties == "random" and random.Random(f"{self.seed}/{answers[i]}/{answers[j]}").random() < 0.5
        return (j, i) if swapped else (i, j)

    def _chosen(self, value: Any, name: str) -> int | None:
        """0, 1 or None for a tie."""
        if self.choices is not None:
            key = _key(value)
            if key not in self.choices:
                raise RowError(f"`{name}` is not one of {', '.join(self.choices)}")
            return self.choices[key]
        return chosen_by_number(value, name)


def chosen_by_number(value: Any, name: str) -> int | None:
    """The answer that a number from 1 (the first) to 2 (the second) prefers: 0 or 1, or None for a tie.

    Raises:
        RowError: any other value.
    """
    try:  # strings are accepted as well, because every field of a CSV file is one
        number = math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if number in (0, 1.5):  # AlpacaFarm and AlpacaEval write one of these for a tie
        return None
    # AlpacaEval 2 writes numbers between 1 and 2, which say how certain the annotator is.
    if not 1 <= number <= 2:
        raise RowError(f"`{name}` is not between 1 and 2")
    return 0 if number < 1.5 else 1


def number_of(value: Any, name: str) -> float:
    """A finite number, which may be written as text.

    Raises:
        RowError: anything else.
    """
    try:
        number = math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError(f"no `{name}`" if value is None else f"`{name}` is not a number")
    return number


def _parse_choices(choices: Any) -> dict[str, int | None] | None:
    if choices is None:
        return None
    given = choices if isinstance(choices, Mapping) else {}
    places: dict[str, int | None] = {"first": 0, "second": 1, "tie": None}
    known = [
        (_key(value), places.get(name))
        for name, values in given.items()
        for value in (values if isinstance(values, list | tuple) else [values])
    ]
    if not {"first", "second"} <= set(given) <= set(places) or len(dict(known)) < len(known):
        raise DataError(
            f"data.choices={choices!r} is not allowed; allowed: a mapping from first, second and optionally tie to the "
            "values, all different, that mean this in the field preference."
        )
    return dict(known)


def _key(value: Any) -> str:
    """A value as it is compared: 1, 1.0 and "1" are the same."""
    text = str(value).strip().lower()
    return text.removesuffix(".0")
