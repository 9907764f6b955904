"""Data in the format of Alpaca and AlpacaFarm, from JSON, JSONL, CSV, TSV or Parquet files or from the Hub."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from rlhf.data.fields import text_field
from rlhf.data.options import check_sources, first_rows, parse_max_rows, parse_on_bad_row, parse_sources, parse_template
from rlhf.data.reading import read_records
from rlhf.data.records import SPLITS, Comparison, Demonstration, Prompt, Split
from rlhf.data.reports import RowReport
from rlhf.data.templates import PromptTemplate
from rlhf.errors import DataError, RowError

TRAINING_SPLITS: tuple[Split, ...] = ("sft", "preference", "prompts")


class Alpaca:
    """Instruction data with a source for each split.

    Fields of a row: `instruction` and optionally `input` in every split; `output` for demonstrations and, as the
    reference output, for `eval`; `output_1`, `output_2` and `preference` (1 or 2, or a number in between) for
    comparisons. A row of `eval` without `output` has no reference output and is not judged.

    A row of a training split (`TRAINING_SPLITS`) whose instruction is also in `eval` is skipped, because a model must
    not be trained on what it is evaluated on. The validation splits train nothing and may contain such rows.

    Skipped rows are logged and, once a split is loaded, counted in `report[split]`.
    """

    def __init__(
        self,
        *,
        template: Any,
        root: str = ".",
        sft: Any = None,
        sft_validation: Any = None,
        preference: Any = None,
        preference_validation: Any = None,
        prompts: Any = None,
        eval: Any = None,
        on_bad_row: str = "skip",
        deduplicate: bool = True,
        exclude_eval_instructions: bool = True,
        max_rows: Any = None,
    ) -> None:
        """Check the configuration, whose values may be anything (hence `Any`); no file is read.

        Args:
            template: What `rlhf.data.options.parse_template` accepts.
            root: The folder of the files.
            sft, sft_validation, preference, preference_validation, prompts, eval: The source of the split, or a list of
                sources (`rlhf.data.sources.Source.parse`). A split without a source is not offered.
            on_bad_row: `skip` counts and skips bad rows; `fail` raises an error.
            deduplicate: Whether a record equal to an earlier one of its split is a bad row.
            exclude_eval_instructions: Whether a training row whose instruction is in `eval` is a bad row.
            max_rows: Most rows per split: a number, a mapping from split to number, or None. The first rows are taken.

        Raises:
            DataError: a malformed template, source, `on_bad_row` or `max_rows`.
        """
        self.template = parse_template(template)
        given: dict[Split, Any] = {
            "sft": sft,
            "sft_validation": sft_validation,
            "preference": preference,
            "preference_validation": preference_validation,
            "prompts": prompts,
            "eval": eval,
        }
        self.sources = {split: parse_sources(specs, Path(root).expanduser()) for split, specs in given.items() if specs}
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
        """Check without reading them that the files can be read.

        Raises:
            DataError: there is no source, or one is missing, a directory, empty or of an unknown format.
        """
        if not self.sources:
            raise DataError(f"data=alpaca needs a source for at least one split; allowed: {', '.join(SPLITS)}.")
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
                excluded = {_normalized(instruction) for instruction in self._read("eval")["instruction"]}
            self._loaded[split], self.report[split] = read_records(
                self.sources[split],
                _ToRecord(split, self.template, excluded),
                split,
                on_bad_row=self._on_bad_row,
                deduplicate=self._deduplicate,
            )
        return self._loaded[split]


@dataclass(frozen=True)
class _ToRecord:
    """Makes the record of a row of `split`; `excluded` are the normalized evaluation instructions."""

    split: Split
    template: PromptTemplate
    excluded: set[str]

    def __call__(self, row: Mapping[str, Any]) -> Demonstration | Comparison | Prompt:
        instruction, input = text_field(row, "instruction"), text_field(row, "input", optional=True)
        prompt = self.template.render(instruction, input)
        untemplated = f"{instruction}\n\n{input}" if input else instruction
        if _normalized(untemplated) in self.excluded:
            raise RowError("instruction is in the evaluation set")
        match self.split:
            case "sft" | "sft_validation":
                return Demonstration(prompt, text_field(row, "output"))
            case "preference" | "preference_validation":
                return Comparison(prompt, *_chosen_and_rejected(row))
            case "eval":
                reference = "" if row.get("output") is None else text_field(row, "output")
                return Prompt(prompt, reference_output=reference, instruction=untemplated)
            case _:
                return Prompt(prompt, instruction=untemplated)


def _chosen_and_rejected(row: Mapping[str, Any]) -> tuple[str, str]:
    first, second, preference = text_field(row, "output_1"), text_field(row, "output_2"), row.get("preference")
    if first == second:
        raise RowError("`output_1` and `output_2` are identical")
    try:  # strings are accepted as well, because every field of a CSV file is one
        number = math.nan if preference is None or isinstance(preference, bool) else float(preference)
    except (TypeError, ValueError):
        number = math.nan
    if number in (0, 1.5):  # AlpacaFarm and AlpacaEval write one of these for a tie
        raise RowError("`preference` is a tie")
    # AlpacaEval 2 writes numbers between 1 and 2, which say how certain the annotator is.
    if not 1 <= number <= 2:
        raise RowError("`preference` is not between 1 and 2" if "preference" in row else "no `preference`")
    return (first, second) if number < 1.5 else (second, first)


def _normalized(instruction: str) -> str:
    """An instruction with single spaces and without case, so that different spellings of one compare equal."""
    return " ".join(instruction.split()).casefold()
