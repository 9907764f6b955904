"""Data in the format of Alpaca and AlpacaFarm, from JSON, JSONL, CSV, TSV or Parquet files or from the Hub."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rlhf.data.choices import chosen_by_number
from rlhf.data.fields import text_field
from rlhf.data.options import parse_sources
from rlhf.data.records import SPLITS, Comparison, Demonstration, Prompt, Split
from rlhf.data.split_sources import SplitSources, normalized
from rlhf.data.templates import PromptTemplate
from rlhf.errors import RowError


class Alpaca(SplitSources):
    """Instruction data with a source for each split.

    Fields of a row: `instruction` and optionally `input` in every split; `output` for demonstrations and, as the
    reference output, for `eval`; `output_1`, `output_2` and `preference` (1 or 2, or a number in between) for
    comparisons. A row of `eval` without `output` has no reference output and is not judged.
    """

    option: ClassVar[str] = "alpaca"

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
        specs = zip(SPLITS, (sft, sft_validation, preference, preference_validation, prompts, eval), strict=True)
        super().__init__(
            {split: parse_sources(spec, Path(root).expanduser()) for split, spec in specs if spec},
            template=template,
            on_bad_row=on_bad_row,
            deduplicate=deduplicate,
            exclude_eval_instructions=exclude_eval_instructions,
            max_rows=max_rows,
        )

    def _to_record(self, split: Split, excluded: set[str]) -> "_ToRecord":
        return _ToRecord(split, self.template, excluded)


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
        if normalized(untemplated) in self.excluded:
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
    first, second = text_field(row, "output_1"), text_field(row, "output_2")
    if first == second:
        raise RowError("`output_1` and `output_2` are identical")
    if "preference" not in row:
        raise RowError("no `preference`")
    chosen = chosen_by_number(row["preference"], "preference")
    if chosen is None:
        raise RowError("`preference` is a tie")
    return (first, second) if chosen == 0 else (second, first)
