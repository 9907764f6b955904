"""Several data sets as one, mixed by weight."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Value, concatenate_datasets

from rlhf.data.options import first_rows, parse_max_rows, parse_template
from rlhf.data.records import SPLITS, VOTES, DataSource, Split, columns, skipped_rows
from rlhf.data.reports import reasons_and_counts
from rlhf.data.split_sources import TRAINING_SPLITS, normalized
from rlhf.errors import DataError

log = logging.getLogger(__name__)

OPTIONAL = {"margin": (None, Value("float64")), VOTES: (1, Value("int64"))}  # for rows of parts that have none
VALIDATION: dict[Split, Split] = {"sft": "sft_validation", "preference": "preference_validation"}


@dataclass(frozen=True)
class MixtureReport:
    """The rows of one split.

    Attributes:
        rows: Part → number of its rows in the mixture, repetitions included.
        counts: `part: reason` → number of skipped rows, as in a stage's summary.
    """

    rows: dict[str, int]
    counts: dict[str, int]


class Mixture:
    """Data sets, called parts, whose training splits are mixed by weight; each is read by its own class.

    A training split has as many rows of each part as its weight says, spread evenly. The other splits, which measure,
    have all rows of all parts. A training row whose prompt is in the `eval` split of any part is skipped.
    """

    def __init__(
        self, *, parts: Any, weights: Any = None, repeat: bool = False, template: Any = None, max_rows: Any = None
    ) -> None:
        """Check the configuration, whose values may be anything (hence `Any`); no file is read.

        Args:
            parts: Mapping from name to data set.
            weights: Mapping from the name of each part to its weight, relative to the others; None takes all rows.
            repeat: Whether the rows of a part are repeated until all rows of all parts are used. Otherwise no row is
                repeated, and the split ends where the first part does.
            template: What `rlhf.data.options.parse_template` accepts; the parts must have the same one or none.
            max_rows: Most rows per split: a number, a mapping from split to number, or None. The first rows are taken.

        Raises:
            DataError: a malformed value.
        """
        self._parts = _parse_parts(parts)
        self._weights = _parse_weights(weights, self._parts)
        self._repeat = repeat
        self._max_rows = parse_max_rows(max_rows)
        self.report: dict[Split, MixtureReport] = {}
        self.splits: tuple[Split, ...] = tuple(split for split in SPLITS if self._with(split))
        if template is not None:
            self.template = parse_template(template)
        self._check_templates()

    def check(self) -> None:
        """Check each part.

        Raises:
            DataError: a part cannot be read, or rows that are held out from a training split would be repeated in it.
        """
        for train, validation in VALIDATION.items():
            if self._repeat and train in self.splits and validation not in self.splits:
                raise DataError(
                    f"data.repeat=true: rows held out from {train} could also be trained on, because no part has "
                    f"{validation}; allowed: data.repeat=false, or a part with {validation}."
                )
        for name, part in self._parts.items():
            try:
                if hasattr(part, "check"):
                    part.check()
            except DataError as error:
                raise DataError(f"data.parts.{name}: {error}") from None

    def load(self, split: Split) -> Dataset:
        """The rows of `split`; see `DataSource.load`. They may have the column `margin` if a part has it.

        Raises:
            DataError: no part has the split, or one cannot be read or has no rows left.
        """
        parts = self._with(split)
        if not parts:
            raise DataError(f"no part of the mixture has {split}; allowed: {', '.join(self.splits)}.")
        # 1. The rows of each part, without prompts that are in the evaluation set of any of them.
        loaded = {name: part.load(split) for name, part in parts.items()}
        counts = {f"{name}: {reason}": count for name, part in parts.items()
                  for reason, count in skipped_rows(part, split).items()}  # fmt: skip
        if split in TRAINING_SPLITS:
            held_out = {
                normalized(prompt) for part in self._with("eval").values() for prompt in part.load("eval")["prompt"]
            }
            for name, rows in loaded.items():
                kept = [i for i, prompt in enumerate(rows["prompt"]) if normalized(prompt) not in held_out]
                if len(kept) < len(rows):
                    counts[f"{name}: prompt is in the evaluation set"] = len(rows) - len(kept)
                    loaded[name] = rows.select(kept)
        # 2. As many of them as the weights say, evenly spread.
        numbers = self._numbers(split, {name: len(rows) for name, rows in loaded.items()})
        self.report[split] = MixtureReport(numbers, counts)
        log.info("%s: %s", split, reasons_and_counts(numbers).replace(" × ", " rows of "))
        whole = concatenate_datasets(_with_same_columns(list(loaded.values()), split))
        return first_rows(
            whole.select(_order(list(numbers.values()), list(map(len, loaded.values())))), split, self._max_rows
        )

    def kinds(self) -> list[str]:
        """For each row of `preference_validation` the name of its part."""
        rows = self.load("preference_validation")
        numbers = self.report["preference_validation"].rows
        names = [name for name, number in numbers.items() for _ in range(number)]
        return [names[i] for i in _order(list(numbers.values()), list(numbers.values()))][: len(rows)]

    def _with(self, split: Split) -> dict[str, DataSource]:
        """The parts that have a split; of a training split only those with a weight."""
        return {
            name: part
            for name, part in self._parts.items()
            if split in part.splits and not (split in TRAINING_SPLITS and self._weights and not self._weights[name])
        }

    def _numbers(self, split: Split, sizes: Mapping[str, int]) -> dict[str, int]:
        """How many rows of each part a split has.

        Raises:
            DataError: it has none of a part.
        """
        if self._weights is None or split not in TRAINING_SPLITS:
            return dict(sizes)
        lengths = [size / self._weights[name] for name, size in sizes.items()]
        length = max(lengths) if self._repeat else min(lengths)
        # The tolerance is for the rounding error of the division: a part that sets the length gives all of its rows.
        numbers = {name: math.floor(length * self._weights[name] + 1e-6) for name in sizes}
        if not all(numbers.values()):
            none = next(name for name, number in numbers.items() if not number)
            raise DataError(
                f"{split}: by the weights there is no row of {none} ({reasons_and_counts(dict(sizes))}); allowed: a "
                "larger weight, more rows, or data.repeat=true."
            )
        return numbers

    def _check_templates(self) -> None:
        known = {"data.template": self.template} if hasattr(self, "template") else {}
        known |= {
            f"data.parts.{name}.template": template
            for name, part in self._parts.items()
            if (template := getattr(part, "template", None)) is not None
        }
        (first, template), *others = known.items() or [("", None)]
        different = next((name for name, other in others if other != template), None)
        if different:
            raise DataError(f"{different} is not {first}; allowed: the same template in all parts.")
        if template is not None:
            self.template = template


def _order(numbers: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Indices into the parts' rows one after the other: `numbers` of each part, evenly spread, repeated if needed."""
    places, start = [], 0
    for number, size in zip(numbers, sizes, strict=True):
        places += [((k + 0.5) / number, start + k % size) for k in range(number)]
        start += size
    return [index for _, index in sorted(places)]


def _with_same_columns(parts: list[Dataset], split: Split) -> list[Dataset]:
    """The parts with the columns of the split, and with `margin` and `votes` if one of them has it."""
    names = columns(split)
    for name, (missing, feature) in OPTIONAL.items():
        if any(name in rows.column_names for rows in parts):
            names.append(name)
            parts = [
                rows if name in rows.column_names else rows.add_column(name, [missing] * len(rows), feature=feature)
                for rows in parts
            ]
    return [rows.select_columns(names) for rows in parts]


def _parse_parts(parts: Any) -> dict[str, DataSource]:
    if not isinstance(parts, Mapping) or not parts or not all(isinstance(part, DataSource) for part in parts.values()):
        raise DataError(
            "data.parts is not a mapping from names to data sets; allowed: for example data.parts.NAME._target_ and "
            "the other keys of an option of `data`."
        )
    return {str(name): part for name, part in parts.items()}


def _parse_weights(weights: Any, parts: Mapping[str, DataSource]) -> dict[str, float] | None:
    """Parse the weights.

    Raises:
        DataError: not null, and not one number from 0 for each part with one above 0.
    """
    if not weights:
        return None
    given = dict(weights) if isinstance(weights, Mapping) else {}
    valid = all(type(weight) in (int, float) and 0 <= weight < math.inf for weight in given.values())
    if set(given) != set(parts) or not valid or not any(given.values()):
        raise DataError(
            f"data.weights={weights!r} is not allowed; allowed: null, or a number from 0 for each of "
            f"{', '.join(parts)}."
        )
    return {name: float(given[name]) for name in parts}
