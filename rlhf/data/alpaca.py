"""Data in the format of Alpaca and AlpacaFarm, from JSON, JSONL, CSV or Parquet files or the Hub."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from rlhf.data.options import (
    check_sources,
    first_rows,
    parse_max_rows,
    parse_on_bad_row,
    parse_sources,
    parse_template,
)
from rlhf.data.reading import BadRows, read_records, text
from rlhf.data.records import SPLITS, Comparison, Demonstration, Prompt, Split
from rlhf.data.templates import Template
from rlhf.errors import DataError, RowError

TRAINING_SPLITS: tuple[Split, ...] = ("sft", "preference", "prompts")


class Alpaca:
    """Demonstrations, comparisons, prompts and evaluation instructions with reference outputs.

    A split's source is a file below `root`, a Hub id `owner/name[:config][:split]`, either with a slice of its rows
    `[start:stop]`, a mapping of arguments for `datasets.load_dataset`, or a list of these; a split without a source is
    not offered. Fields: `instruction` and `input` (may be missing) everywhere; `output` for demonstrations and, as
    the reference output, for `eval`; `output_1`, `output_2` and `preference` (1 or 2, or between) for
    comparisons. Without `output`, `eval` has no reference output, and the row is not judged.

    Rows of the training splits whose instruction is in the `eval` source are skipped, as it would be trained on
    what it is tested on; the validation splits train nothing and may hold the evaluation instructions.
    Skipped rows are logged and, once a split is loaded, listed in `report[split]`. `max_rows` then takes the first so
    many records, of every split or as a mapping from split to number.
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
        """Understand the configuration as it comes (hence `Any`); `check` then looks for the files, `load` reads them.

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
        self.report: dict[Split, BadRows] = {}
        self._on_bad_row = parse_on_bad_row(on_bad_row)
        self._deduplicate = deduplicate
        self._exclude_eval = exclude_eval_instructions and "eval" in self.sources
        self._max_rows = parse_max_rows(max_rows)
        self._loaded: dict[Split, Dataset] = {}

    @property
    def concerns(self) -> dict[str, tuple[Split, ...]]:
        """A split's source decides its own rows; that of `eval` also which training rows are excluded."""
        return {
            split: (split, *TRAINING_SPLITS) if split == "eval" and self._exclude_eval else (split,) for split in SPLITS
        }

    def check(self) -> None:
        """See in an instant whether the files are there, before a model is loaded.

        Raises:
            DataError: no source at all, or one that is missing, a directory, empty or of an unknown format.
        """
        if not self.sources:
            raise DataError(f"data=alpaca needs a source for at least one of {', '.join(SPLITS)}.")
        for split, sources in self.sources.items():
            check_sources(f"data.{split}", sources)

    def load(self, split: Split) -> Dataset:
        """Rows of `split`, with the columns of its record.

        Raises:
            DataError: there is no such split, it cannot be read, or not a single row of it can be used.
        """
        if split not in self.sources:
            raise DataError(f"data.{split} is not configured: there is {', '.join(self.splits) or 'no split at all'}.")
        rows = self._read(split)
        return first_rows(rows, split, self._max_rows)

    def _read(self, split: Split) -> Dataset:
        if split not in self._loaded:
            excluded: set[str] = set()
            if self._exclude_eval and split in TRAINING_SPLITS:
                excluded = {_key(instruction) for instruction in self._read("eval")["instruction"]}
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
    """Makes the records of a split; `excluded`: keys of evaluation instructions."""

    split: Split
    template: Template
    excluded: set[str]

    def __call__(self, row: Mapping[str, Any]) -> Demonstration | Comparison | Prompt:
        instruction, input = text(row, "instruction"), text(row, "input", optional=True)
        prompt = self.template.render(instruction, input)
        bare = f"{instruction}\n\n{input}" if input else instruction
        if _key(bare) in self.excluded:
            raise RowError("instruction is in the evaluation set")
        match self.split:
            case "sft" | "sft_validation":
                return Demonstration(prompt, text(row, "output"))
            case "preference" | "preference_validation":
                return Comparison(prompt, *_chosen_and_rejected(row))
            case "eval":
                reference = "" if row.get("output") is None else text(row, "output")
                return Prompt(prompt, reference_output=reference, instruction=bare)
            case _:
                return Prompt(prompt, instruction=bare)


def _chosen_and_rejected(row: Mapping[str, Any]) -> tuple[str, str]:
    first, second, preference = text(row, "output_1"), text(row, "output_2"), row.get("preference")
    if first == second:
        raise RowError("`output_1` and `output_2` are identical")
    try:
        number = math.nan if preference is None or isinstance(preference, bool) else float(preference)  # CSV has text
    except (TypeError, ValueError):
        number = math.nan
    if number in (0, 1.5):  # what AlpacaFarm and AlpacaEval write for a draw
        raise RowError("`preference` is a tie")
    if not 1 <= number <= 2:  # between them, AlpacaEval 2 writes how sure the annotator is
        raise RowError("`preference` is not between 1 and 2" if "preference" in row else "no `preference`")
    return (first, second) if number < 1.5 else (second, first)


def _key(instruction: str) -> str:
    """What two spellings of an instruction have in common: all but white space and case."""
    return " ".join(instruction.split()).casefold()
