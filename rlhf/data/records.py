"""The record contract between data sets and stages: three kinds of row, six splits."""

from dataclasses import dataclass, fields
from typing import Literal, Protocol, get_args, runtime_checkable

from datasets import Dataset

from rlhf.errors import DataError

Split = Literal["sft", "sft_validation", "preference", "preference_validation", "prompts", "eval"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What supervised fine-tuning imitates: `response` is to follow `prompt` and to end there."""

    prompt: str
    response: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the reward model learns from: an annotator preferred `chosen` to `rejected`."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class SampledComparison(Comparison):
    """A comparison of sampled answers: one that was cut off has no end, and gets no EOS."""

    chosen_ended: bool = True
    rejected_ended: bool = True


@dataclass(frozen=True, slots=True)
class Prompt:
    """What PPO and the evaluation answer.

    `prompt` is the templated text that a model reads; `instruction` the bare request that a judge reads;
    `reference_output` the answer to beat (evaluation only).
    """

    prompt: str
    reference_output: str = ""
    instruction: str = ""


RECORDS: dict[Split, type] = {
    "sft": Demonstration,
    "sft_validation": Demonstration,
    "preference": Comparison,
    "preference_validation": Comparison,
    "prompts": Prompt,
    "eval": Prompt,
}


def columns(split: Split) -> list[str]:
    """The columns of `split`: the field names of its record."""
    return [field.name for field in fields(RECORDS[split])]


@runtime_checkable
class DataSource(Protocol):
    """What a class named by `data._target_` offers.

    It may have `concerns`, a mapping from a key of its configuration to the splits whose rows that key decides. When
    such a key changes, models that were trained on the other splits stay as they are.
    """

    @property
    def splits(self) -> tuple[Split, ...]:
        """Those it has."""
        ...

    def load(self, split: Split) -> Dataset:
        """Rows of `split`, with exactly the columns of its record (all strings, none missing).

        Raises:
            DataError: the split does not exist, cannot be read or ends up empty.
        """
        ...


def divided(source: DataSource, split: Split, held_out: Split, size: int) -> tuple[list, list]:
    """Training and held-out rows: the data set's own validation split, or the end of the training split.

    Raises:
        DataError: there are too few rows.
    """
    rows = source.load(split)
    if held_out in source.splits:
        other = source.load(held_out)
        return records(rows, split), records(other.select(range(min(size, len(other)))), held_out)
    if len(rows) <= size:
        raise DataError(f"the split {split} has {len(rows)} rows, too few to hold out {size}")
    everything = records(rows.shuffle(seed=0), split)
    return everything[:-size], everything[-size:]


def skipped_rows(source: DataSource, split: Split) -> dict[str, int]:
    """How many rows were bad, by reason, for a summary; {} for a data set that does not count them (`report`)."""
    report = getattr(source, "report", {}).get(split)
    return report.counts if report else {}


def records(rows: Dataset, split: Split) -> list:
    """The rows as records of their split."""
    kind = SampledComparison if "chosen_ended" in rows.column_names else RECORDS[split]
    return [kind(**row) for row in rows]
