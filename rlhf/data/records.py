"""The contract between data sets and training stages: six splits, three kinds of record, and the `DataSource` protocol.

A data set yields rows whose columns are the fields of its split's record. Stages turn rows into records with
`as_records`.
"""

import itertools
from dataclasses import dataclass, fields
from typing import Literal, Protocol, get_args, runtime_checkable

from datasets import Dataset

from rlhf.errors import DataError

# The validation splits measure SFT and the reward model while they are trained; `eval` measures the finished policy.
Split = Literal["sft", "sft_validation", "preference", "preference_validation", "prompts", "eval"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A supervised fine-tuning example: the model learns to continue `prompt` with `response`, followed by EOS."""

    prompt: str
    response: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """A reward-model example: an annotator preferred the response `chosen` to the response `rejected`."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class SampledComparison(Comparison):
    """A comparison of two responses sampled from a model.

    `chosen_ended` and `rejected_ended` are whether the response ended by itself. A response that was truncated at the
    length limit did not end, so no EOS is appended to it.
    """

    chosen_ended: bool = True
    rejected_ended: bool = True


@dataclass(frozen=True, slots=True)
class ScoredComparison(Comparison):
    """A comparison of two responses that have scores; `margin` is the difference, or None if this one has none."""

    margin: float | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt for PPO rollouts or for evaluation.

    Attributes:
        prompt: The templated text that the policy continues.
        reference_output: The response that the policy's response is compared with; used in evaluation only. Empty if
            there is none, and then no judge compares the row.
        instruction: The request without the template, as shown to judges.
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
    """The column names of `split`, which are the field names of its record."""
    return [field.name for field in fields(RECORDS[split])]


@runtime_checkable
class DataSource(Protocol):
    """A data set: an instance of the class that `data._target_` names, made with the other keys of `data`.

    Two members are required: `splits` and `load`. A class need not inherit from `DataSource`.

    The rows of a split have the fields of its record as columns (see `columns`), all of them strings but `margin`:

    - `sft`, `sft_validation` (supervised fine-tuning): `prompt`, `response`.
    - `preference`, `preference_validation` (reward model): `prompt`, `chosen`, `rejected`, and optionally `margin`, a
      number or null. A row of `preference` may count several times: `votes` says how many annotators made it.
    - `prompts` (PPO rollouts): `prompt`, `reference_output`, `instruction`; the last two may be "".
    - `eval` (evaluation): the same; without a reference output there is no win rate.

    A validation split is optional: without it, rows are held out from the training split (`train_and_held_out`).
    `prompt` is the final, templated text, and nothing is inserted between it and the response. The stages append the
    EOS token to `response`, `chosen` and `rejected`. A special token spelled out in a text, such as `<s>`, is tokenized
    as ordinary characters.

    The constructor should only validate its arguments, because it also runs when a configuration is merely checked;
    reading files belongs in `load`. Report a problem with the data as `rlhf.errors.DataError`, with one sentence that
    names the key, file or row: it is shown to the user without a traceback.

    A class may offer more. The following members are optional and are looked up by name:

    - `check() -> None`: raise `DataError` for missing or empty files. Called before any model is made, so it must be
      fast.
    - `concerns: Mapping[str, Collection[Split]]`: for a key of the configuration, the splits whose rows it affects.
      When such a key changes, cached models that were trained on other splits are still used. A key that is not in the
      mapping affects all splits.
    - `report: Mapping[Split, ...]`: after `load(split)`, `report[split].counts` maps each reason for skipping a row to
      the number of skipped rows. A stage copies it into its `summary.json`.
    - `template: rlhf.data.templates.PromptTemplate`: the prompt template. Special tokens that are spelled out in its
      fixed text, such as `<|im_start|>`, are tokenized as special tokens. With a chat template, responses are what the
      assistant says, without the end of its turn, which the stages append.
    - `tokenizer() -> PreTrainedTokenizerBase`: a tokenizer for models trained from scratch. Without it, a BPE
      tokenizer is trained on the `sft` split.
    - `utility(prompt: str, response: str) -> float`: the ground-truth quality of a response, which makes `judge=gold`
      and `scorer=gold` possible.
    - `facts(prompt: str, response: str)`: an object with the attributes `stated` and `true`, the number of facts in a
      response and how many of them are true (`rlhf.data.farm.Facts`, for example); reported as factual precision.
    - `group(prompt: str) -> str` and `groups`, all its values: which part of the evaluation a prompt belongs to, a word
      such as `famous`, or "" for none; factual precision is then also reported for each part.
    - `probes() -> list[tuple[str, str, str]]`: facts that a model may know, each as a prompt, the beginning of an
      answer, and the text that completes it truly; evaluations report how many are known and how many were forgotten.
    - `kinds() -> list[str]`: for each row of `preference_validation` a word that says how its two responses differ; the
      reward model's accuracy is then also reported for each kind. An empty list says that there are no kinds.
    - `labelled(split: Split) -> Dataset`: rows with `text` (str) and `label` (0 or 1), on which
      `scorer=bag_of_words` (`sft`) and `bag_of_characters` (`prompts`) train their classifiers and test them (`eval`).

    Example::

        class Capitals:
            splits = ("sft", "prompts")

            def __init__(self, capitals: dict[str, str]):
                self.capitals = capitals

            def load(self, split):
                prompts = [f"The capital of {country} is" for country in self.capitals]
                if split == "sft":
                    responses = [f" {capital}." for capital in self.capitals.values()]
                    return Dataset.from_dict({"prompt": prompts, "response": responses})
                empty = [""] * len(prompts)
                return Dataset.from_dict({"prompt": prompts, "reference_output": empty, "instruction": prompts})
    """

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that `load` accepts. A class attribute or an instance attribute will do."""
        ...

    def load(self, split: Split) -> Dataset:
        """The rows of `split`.

        Called several times in a run, and by every process of a distributed run, so it must be deterministic: the same
        configuration must give the same rows in the same order.

        Returns:
            A dataset of at least one row with exactly the columns `columns(split)`, all of them strings and none null.
            Rows of comparisons may also have the columns `margin` and `votes`, and rows of `prompts` and `eval` any
            others, which a function that rewards the answers may ask for (`rlhf.scorers.columns`).

        Raises:
            DataError: `split` is not in `splits`, cannot be read, or has no rows.
        """
        ...


VOTES = "votes"
MOST_HELD_OUT = 0.2  # of the rows of a split without validation


def train_and_held_out(source: DataSource, split: Split, validation: Split, size: int) -> tuple[list, list]:
    """The records to train on and the records held out for validation.

    If `source` has the split `validation`, its first `size` records are held out and the whole of `split` is used for
    training. Otherwise `split` is shuffled with a fixed seed and its last `size` records are held out. `key` is what an
    error calls `size`.

    Raises:
        DataError: `split` has at most `size` rows and there is no validation split.
    """
    rows = source.load(split)
    if validation in source.splits:
        held_out = source.load(validation)
        return as_records(rows, split), first_records(held_out, validation, size)
    size = held_out_rows(len(rows), split, validation, size)
    # Shuffled because files are often sorted, by topic say, and then their end does not represent the whole.
    records = as_records(rows.shuffle(seed=0), split)
    return records[:-size], records[-size:]


def held_out_rows(rows: int, split: Split, validation: Split, size: int) -> int:
    """How many rows of a split are held out if `size` shall be: not more than a fifth of a small one.

    Raises:
        DataError: none would be left to train on.
    """
    if rows < 2:
        raise DataError(
            f"the split {split} has {rows} row, which cannot be held out and trained on; allowed: more rows, or a "
            f"split {validation}"
        )
    return min(size, max(1, int(MOST_HELD_OUT * rows)))


def skipped_rows(source: DataSource, split: Split) -> dict[str, int]:
    """The number of skipped rows by reason, for the summary of a stage; empty if `source` does not count them."""
    report = getattr(source, "report", {}).get(split)
    return report.counts if report else {}


def as_records(rows: Dataset, split: Split) -> list:
    """The rows as instances of the split's record class, or of the kind of comparison that has all their columns.

    A comparison is there as often as it has votes, as the same object.
    """
    kinds = {"chosen_ended": SampledComparison, "margin": ScoredComparison}
    record = next((kind for column, kind in kinds.items() if column in rows.column_names), RECORDS[split])
    names = [field.name for field in fields(record) if field.name in rows.column_names]
    columns = [rows[name][:] for name in names]  # whole columns: row by row a data set takes ten times as long
    records = [record(**dict(zip(names, values, strict=True))) for values in zip(*columns, strict=True)]
    if not _has_votes(rows, split):
        return records
    return [each for each, votes in zip(records, rows[VOTES][:], strict=True) for _ in range(votes)]


def count_rows(rows: Dataset, split: Split) -> int:
    """The number of rows, each counted as often as it has votes."""
    return sum(rows[VOTES][:]) if _has_votes(rows, split) else len(rows)


def _has_votes(rows: Dataset, split: Split) -> bool:
    return split == "preference" and VOTES in rows.column_names


def count_prompts(rows: Dataset) -> int:
    """The number of prompts, where consecutive rows with the same one count once, as for `reward.group_prompts`."""
    return sum(1 for _ in itertools.groupby(rows["prompt"][:]))


def first_records(rows: Dataset, split: Split, count: int) -> list:
    """The first `count` rows as records, or all where there are fewer."""
    return as_records(rows.select(range(min(count, len(rows)))), split)[:count]
