"""Film reviews (IMDB), as TRL's sentiment example uses them: SFT learns to write reviews, PPO to write kind ones."""

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value

from rlhf.data.options import check_sources, first_rows, parse_max_rows, parse_on_bad_row, parse_sources
from rlhf.data.reading import BadRows, read_records, text
from rlhf.data.records import Split, columns
from rlhf.data.splitting import Shares, expand
from rlhf.errors import DataError, RowError

OFFERED: tuple[Split, ...] = ("sft", "sft_validation", "prompts", "eval")
LABELS = {"0": "0", "neg": "0", "negative": "0", "1": "1", "pos": "1", "positive": "1", "-1": "", "unsup": ""}
_BREAKS = re.compile(r"\s*<br\s*/?>\s*", re.IGNORECASE)
_WORD = re.compile(r"\S+")


@dataclass(frozen=True, slots=True)
class Review:
    """A review without markup, and its sentiment: "0" negative, "1" positive, "" unknown."""

    text: str
    label: str


class Imdb:
    """Reviews divided into splits by a hash of their text: none is in two.

    `reviews` is a file below `root` or a Hub id as in `rlhf.data.sources.Source`, or a list of these, with the fields
    `text` and `label` (0 or 1; -1 or missing: unknown). `sft` imitates whole reviews after an empty prompt; `prompts`
    and `eval` begin with a review's first words, as many as a draw between the bounds `prompt_words` says, and `eval`
    has the rest as reference output, so that prompt and reference together are the review.
    """

    def __init__(
        self,
        *,
        reviews: Any,
        shares: Any,
        root: str = ".",
        prompt_words: Any = (2, 8),
        seed: int = 0,
        on_bad_row: str = "skip",
        deduplicate: bool = True,
        max_rows: Any = None,
    ) -> None:
        """Understand the configuration as it comes (hence `Any`); `check` then looks for the files, `load` reads them.

        Raises:
            DataError: a malformed source, `shares`, `prompt_words`, `on_bad_row` or `max_rows`.
        """
        self.sources = parse_sources(reviews, Path(root).expanduser())
        self._shares = Shares.parse(shares, seed, OFFERED)
        self.splits = self._shares.splits
        self.report: dict[Split, BadRows] = {}
        self._words, self._seed = _parse_words(prompt_words), seed
        self._on_bad_row = parse_on_bad_row(on_bad_row)
        self._deduplicate = deduplicate
        self._max_rows = parse_max_rows(max_rows)
        self._read: tuple[Dataset, BadRows] | None = None

    def check(self) -> None:
        """See in an instant whether the files are there, before a model is loaded.

        Raises:
            DataError: no source at all, or one that is missing, empty or of an unknown format.
        """
        if not self.sources:
            raise DataError("data.reviews names nothing: a file with the fields text and label, or a Hub id.")
        check_sources("data.reviews", self.sources)

    def load(self, split: Split) -> Dataset:
        """Rows of `split`, with the columns of its record.

        Raises:
            DataError: there is no such split, a source cannot be read, or the split is empty.
        """
        features = Features(dict.fromkeys(columns(split), Value("string")))
        return self._expand(split, _ToRecords(split, self._shares, self._words, self._seed), features)

    def labelled(self, split: Split) -> Dataset:
        """Whole reviews of `split`'s share with `text` and `label` (0 or 1), to train or test a sentiment classifier.

        Raises:
            DataError: there is no such split, a source cannot be read, or no review of the split has a label.
        """
        features = Features({"text": Value("string"), "label": Value("int64")})
        return self._expand(split, _ToLabelled(split, self._shares), features)

    def _expand(self, split: Split, records: Any, features: Features) -> Dataset:
        if split not in self.splits:
            raise DataError(f"data.shares gives nothing to {split}: there is {', '.join(self.splits)}.")
        if self._read is None:
            self._read = read_records(
                self.sources,
                _to_review,
                "reviews",
                on_bad_row=self._on_bad_row,
                deduplicate=self._deduplicate,
                record=Review,
            )
        reviews, self.report[split] = self._read
        labelled = " that is labelled" if "label" in features else ""
        nothing = f"{split}: its share of the {len(reviews):,} reviews holds none{labelled}."
        rows = expand(reviews, records, features, split, nothing)
        return first_rows(rows, split, self._max_rows)


def _parse_words(words: Any) -> tuple[int, int]:
    bounds = tuple(words) if isinstance(words, list | tuple) else ()
    if len(bounds) != 2 or any(type(bound) is not int for bound in bounds) or not 1 <= bounds[0] <= bounds[1]:
        raise DataError(f"prompt_words is [fewest, most] with 1 <= fewest <= most, not {words!r}.")
    return bounds


def _to_review(row: Mapping[str, Any]) -> Review:
    review = re.sub(r"\n{3,}", "\n\n", _BREAKS.sub("\n", text(row, "text"))).strip()
    if len(review.split(maxsplit=1)) < 2:
        raise RowError("`text` is shorter than two words")
    label = row.get("label")
    known = "" if label is None else LABELS.get(str(label).strip().lower())
    if known is None:
        raise RowError("`label` is neither 0 nor 1")
    return Review(review, known)


@dataclass(frozen=True)
class _ToRecords:
    """Makes the record that a split has of a review."""

    split: Split
    shares: Shares
    words: tuple[int, int]
    seed: int

    def __call__(self, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        review = row["text"]
        if self.shares.split_of(review) != self.split:
            return
        if self.split in ("sft", "sft_validation"):
            yield {"prompt": "", "response": review}
            return
        ends = [word.end() for word in _WORD.finditer(review)]
        words = random.Random(f"{self.seed}/{review}").randint(*self.words)
        end = ends[min(words, len(ends) - 1) - 1]  # a word at least is left to write
        reference = review[end:] if self.split == "eval" else ""
        yield {"prompt": review[:end], "reference_output": reference, "instruction": review[:end]}


@dataclass(frozen=True)
class _ToLabelled:
    """Keeps the labelled reviews of a split."""

    split: Split
    shares: Shares

    def __call__(self, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        if row["label"] and self.shares.split_of(row["text"]) == self.split:
            yield {"text": row["text"], "label": int(row["label"])}
