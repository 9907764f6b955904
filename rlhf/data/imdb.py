"""Film reviews (IMDB) as in TRL's sentiment example: SFT learns to write reviews, and PPO to write positive ones."""

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value

from rlhf.data.fields import text_field
from rlhf.data.options import check_sources, first_rows, parse_max_rows, parse_on_bad_row, parse_sources
from rlhf.data.reading import read_records
from rlhf.data.records import Split, columns
from rlhf.data.reports import RowReport
from rlhf.data.splitting import Shares, ToRecords, expand
from rlhf.errors import DataError, RowError

OFFERED: tuple[Split, ...] = ("sft", "sft_validation", "prompts", "eval")
# The spellings of a label in a file → the label of a `Review`.
LABELS = {"0": "0", "neg": "0", "negative": "0", "1": "1", "pos": "1", "positive": "1", "-1": "", "unsup": ""}
_LINE_BREAKS = re.compile(r"\s*<br\s*/?>\s*", re.IGNORECASE)
_WORD = re.compile(r"\S+")


@dataclass(frozen=True, slots=True)
class Review:
    """A review without line-break tags, and its sentiment: "0" negative, "1" positive, "" unknown."""

    text: str
    label: str


class Imdb:
    """Film reviews, assigned to splits by a hash of their text, so that no review is in two splits.

    `sft` and `sft_validation` have an empty prompt and the whole review as response. `prompts` and `eval` have the
    first words of a review as prompt. `eval` also has the rest as reference output, so that prompt and reference output
    together are the review.
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
        """Check the configuration, whose values may be anything (hence `Any`); no file is read.

        Args:
            reviews: A source or a list of sources (`rlhf.data.sources.Source.parse`) with the fields `text` and `label`
                (0 negative, 1 positive, -1 or missing: unknown; see `LABELS`).
            shares: Mapping from split to its share of the reviews (`rlhf.data.splitting.Shares`).
            root: The folder of the files.
            prompt_words: The fewest and the most words of a prompt; the number is drawn uniformly for each review.
            seed: Selects the split of each review, the length of each prompt, and the order of the rows.
            on_bad_row: `skip` counts and skips bad rows; `fail` raises an error.
            deduplicate: Whether a repeated review is a bad row.
            max_rows: Most rows per split: a number, a mapping from split to number, or None.

        Raises:
            DataError: a malformed source, `shares`, `prompt_words`, `on_bad_row` or `max_rows`.
        """
        self.sources = parse_sources(reviews, Path(root).expanduser())
        self._shares = Shares.parse(shares, seed, OFFERED)
        self.splits = self._shares.splits
        self.report: dict[Split, RowReport] = {}
        self._prompt_words, self._seed = _parse_prompt_words(prompt_words), seed
        self._on_bad_row = parse_on_bad_row(on_bad_row)
        self._deduplicate = deduplicate
        self._max_rows = parse_max_rows(max_rows)
        self._reviews: tuple[Dataset, RowReport] | None = None

    def check(self) -> None:
        """Check without reading them that the files can be read.

        Raises:
            DataError: there is no source, or one is missing, empty or of an unknown format.
        """
        check_sources("data.reviews", self.sources, "a file with the fields text and label, or a Hub id")

    def load(self, split: Split) -> Dataset:
        """The rows of `split`; see `DataSource.load`.

        Raises:
            DataError: the split has no share, a source cannot be read, or the split is empty.
        """
        features = Features(dict.fromkeys(columns(split), Value("string")))
        return self._expand(split, _ToRecords(split, self._shares, self._prompt_words, self._seed), features)

    def labelled(self, split: Split) -> Dataset:
        """The labelled reviews in the share of `split`, for training or testing a sentiment classifier.

        Returns:
            Whole reviews with the columns `text` (str) and `label` (0 negative, 1 positive).

        Raises:
            DataError: the split has no share, a source cannot be read, or no review of the split has a label.
        """
        features = Features({"text": Value("string"), "label": Value("int64")})
        return self._expand(split, _ToLabelled(split, self._shares), features)

    def _expand(self, split: Split, to_records: ToRecords, features: Features) -> Dataset:
        """The rows that `to_records` makes of all reviews, which are read once."""
        self._shares.require(split)
        if self._reviews is None:
            self._reviews = read_records(
                self.sources,
                _to_review,
                "reviews",
                on_bad_row=self._on_bad_row,
                deduplicate=self._deduplicate,
                record=Review,
            )
        reviews, self.report[split] = self._reviews
        labelled = " and is labelled" if "label" in features else ""
        if_empty = f"{split}: none of the {len(reviews):,} reviews falls into its share{labelled}."
        rows = expand(reviews, to_records, features, split, if_empty)
        # Files of reviews are mostly sorted by label, and evaluations and `max_rows` take the first rows.
        return first_rows(rows.shuffle(seed=self._seed), split, self._max_rows)


def _parse_prompt_words(words: Any) -> tuple[int, int]:
    bounds = tuple(words) if isinstance(words, list | tuple) else ()
    if len(bounds) != 2 or any(type(bound) is not int for bound in bounds) or not 1 <= bounds[0] <= bounds[1]:
        raise DataError(
            f"data.prompt_words={words!r} is not allowed; allowed: [fewest, most] with 1 <= fewest <= most."
        )
    return bounds


def _to_review(row: Mapping[str, Any]) -> Review:
    review = re.sub(r"\n{3,}", "\n\n", _LINE_BREAKS.sub("\n", text_field(row, "text"))).strip()
    if len(review.split(maxsplit=1)) < 2:
        raise RowError("`text` is shorter than two words")  # a prompt needs a word, and so does its continuation
    value = row.get("label")
    label = "" if value is None else LABELS.get(str(value).strip().lower())
    if label is None:
        raise RowError("`label` is not one of 0, 1, neg, pos, negative, positive, -1, unsup")
    return Review(review, label)


@dataclass(frozen=True)
class _ToRecords:
    """Makes the record of a review, if the review is in `split`."""

    split: Split
    shares: Shares
    prompt_words: tuple[int, int]
    seed: int

    def __call__(self, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        review = row["text"]
        if self.shares.split_of(review) != self.split:
            return
        if self.split in ("sft", "sft_validation"):
            yield {"prompt": "", "response": review}
            return
        # Seeding by the review makes its prompt independent of the other reviews.
        ends = [word.end() for word in _WORD.finditer(review)]
        words = random.Random(f"{self.seed}/{review}").randint(*self.prompt_words)
        end = ends[min(words, len(ends) - 1) - 1]  # at least one word is left to write
        reference = review[end:] if self.split == "eval" else ""
        yield {"prompt": review[:end], "reference_output": reference, "instruction": review[:end]}


@dataclass(frozen=True)
class _ToLabelled:
    """Makes a row for the classifier from a review, if the review is in `split` and has a label."""

    split: Split
    shares: Shares

    def __call__(self, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        if row["label"] and self.shares.split_of(row["text"]) == self.split:
            yield {"text": row["text"], "label": int(row["label"])}
