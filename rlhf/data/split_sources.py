"""A data set with sources for each split: what is read, excluded, counted and kept."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from datasets import Dataset

from rlhf.data.options import check_sources, first_rows, parse_max_rows, parse_on_bad_row, parse_template
from rlhf.data.reading import RowSource, ToRecord, read_records
from rlhf.data.records import SPLITS, Split
from rlhf.data.reports import RowReport
from rlhf.errors import DataError

TRAINING_SPLITS: tuple[Split, ...] = ("sft", "preference", "prompts")


class SplitSources:
    """The common part of data sets whose splits have sources of their own; a subclass makes the records (`_to_record`).

    A row of a training split (`TRAINING_SPLITS`) whose instruction is also in `eval` is skipped, because a model must
    not be trained on what it is evaluated on. The validation splits train nothing and may contain such rows.

    Skipped rows are logged and, once a split is loaded, counted in `report[split]`.
    """

    option: ClassVar[str]
    """The option of `data`, for messages."""
    record_classes: Mapping[Split, type] = {}
    """The record class of a split, if it is not that of `rlhf.data.records.RECORDS`."""

    def __init__(
        self,
        sources: Mapping[Split, Sequence[RowSource]],
        *,
        template: Any,
        on_bad_row: str,
        deduplicate: bool,
        exclude_eval_instructions: bool,
        max_rows: Any,
    ) -> None:
        """Check the configuration; no file is read.

        Raises:
            DataError: a malformed template, `on_bad_row` or `max_rows`.
        """
        self.template = parse_template(template)
        self.sources = {split: tuple(sources[split]) for split in SPLITS if split in sources}
        self.splits: tuple[Split, ...] = tuple(self.sources)
        self.report: dict[Split, RowReport] = {}
        self._on_bad_row = parse_on_bad_row(on_bad_row)
        self._deduplicate = deduplicate
        self._exclude_eval = exclude_eval_instructions and "eval" in self.sources
        self._max_rows = parse_max_rows(max_rows)
        self._loaded: dict[Split, Dataset] = {}

    @property
    def concerns(self) -> dict[str, tuple[Split, ...]]:
        """The splits that each split's source affects; see `DataSource`.

        The source of `eval` also affects the training splits, if its instructions are excluded from them.
        """
        return {
            split: (split, *TRAINING_SPLITS) if split == "eval" and self._exclude_eval else (split,) for split in SPLITS
        }

    def check(self) -> None:
        """Check that the files can be read.

        Raises:
            DataError: there is no source, or one is missing, a directory, empty or of an unknown format.
        """
        if not self.sources:
            raise DataError(f"data={self.option} needs a source for at least one split; allowed: {', '.join(SPLITS)}.")
        for split, sources in self.sources.items():
            check_sources(f"data.{split}", sources, "a file or a Hub id")

    def load(self, split: Split) -> Dataset:
        """The rows of `split`; see `DataSource.load`.

        Raises:
            DataError: the split has no source, it cannot be read, or none of its rows can be used.
        """
        if split not in self.sources:
            raise DataError(
                f"data.{split} is not configured; allowed: {', '.join(self.splits) or 'none (no split has a source)'}."
            )
        return first_rows(self._read(split), split, self._max_rows)

    def _read(self, split: Split) -> Dataset:
        """All rows of `split`, whatever `max_rows`: all evaluation instructions are excluded, not only those used."""
        if split not in self._loaded:
            excluded: set[str] = set()
            if self._exclude_eval and split in TRAINING_SPLITS:
                excluded = {normalized(instruction) for instruction in self._read("eval")["instruction"]}
            self._loaded[split], self.report[split] = read_records(
                self.sources[split],
                self._to_record(split, excluded),
                split,
                on_bad_row=self._on_bad_row,
                deduplicate=self._deduplicate,
                record=self.record_classes.get(split),
            )
        return self._loaded[split]

    def _to_record(self, split: Split, excluded: set[str]) -> ToRecord:
        """What makes the records of `split`; `excluded` are the normalized evaluation instructions."""
        raise NotImplementedError


def normalized(instruction: str) -> str:
    """An instruction with single spaces and without case, so that different spellings of one compare equal."""
    return " ".join(instruction.split()).casefold()
