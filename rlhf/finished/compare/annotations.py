"""Pairs of answers with the verdict of an annotator, from wherever such pairs are."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.records import Comparison, DataSource, Prompt, Split, as_records
from rlhf.data.saved_preferences import PREFERENCE_SPLITS
from rlhf.data.sources import Source
from rlhf.data.templates import Template
from rlhf.errors import DataError
from rlhf.evaluation.client import uniform_from_hash
from rlhf.evaluation.prompts import strip_template
from rlhf.files import read_lines
from rlhf.finished.compare.results import ANSWERS, COMPARISON, VERDICTS

ALLOWED = (
    f"{' or '.join(PREFERENCE_SPLITS)} (the comparisons of the data set), the …_pairs.jsonl of simulated preferences, "
    "annotations in AlpacaFarm's format, or a folder of rlhf-compare"
)


@dataclass(frozen=True)
class Annotated:
    """Two answers to a prompt: the second is its reference output.

    Attributes:
        prompt: the prompt.
        first: the other answer.
        outcome: the annotator's verdict: 1 if the first answer is better, 0 if the second is, ½ for a tie, None for
            no verdict.
    """

    prompt: Prompt
    first: str
    outcome: float | None


def read_annotations(word: str, source: DataSource) -> list[Annotated]:
    """The annotated pairs that a word names; see `ALLOWED`.

    Args:
        word: the word.
        source: the data set whose split is meant, or whose template the prompts of a file get.

    Raises:
        DataError: it names none, or they cannot be read.
    """
    path, template = Path(word).expanduser(), getattr(source, "template", None)
    if word in PREFERENCE_SPLITS:
        return _of_data(source, word, template)
    if (path / COMPARISON).exists():
        return list(_of_comparison(path))
    if path.is_dir() or not path.exists():
        raise DataError(f"{word}: there are no annotations; allowed: {ALLOWED}")
    file = Source(word, path)
    file.check()
    pairs = []
    for number, row in file.rows():
        read = _of_simulation if isinstance(row, dict) and "preferred" in row else _of_alpaca_farm
        try:
            pairs.append(read(row, template))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DataError(f"{word}, row {number}: it is no annotation of two outputs; allowed: {ALLOWED}") from None
    return pairs


def _of_data(source: DataSource, split: Split, template: Template | None) -> list[Annotated]:
    """The comparisons of a split. Which answer is the first is drawn, as the better one would always be."""
    if split not in source.splits:
        raise DataError(f"the data set has no split {split}; allowed: {ALLOWED}")
    pairs = []
    for i, row in enumerate(as_records(source.load(split), split)):
        chosen, rejected = _with_endings(row)
        turned = uniform_from_hash(0, "first", f"{i}\n{row.prompt}") < 0.5
        first, second = (rejected, chosen) if turned else (chosen, rejected)
        prompt = Prompt(row.prompt, second, strip_template(row.prompt, template))
        pairs.append(Annotated(prompt, first, float(not turned)))
    return pairs


def _with_endings(row: Comparison) -> tuple[str, str]:
    """The two answers; each knows whether it ended by itself, if it was sampled."""
    from rlhf.models.tokenizing import Response

    ended = (getattr(row, f"{side}_ended", True) for side in ("chosen", "rejected"))
    chosen, rejected = (Response(text, (), end) for text, end in zip((row.chosen, row.rejected), ended, strict=True))
    return chosen, rejected


def _of_comparison(folder: Path) -> Iterator[Annotated]:
    """The pairs of a comparison, with its judge's verdicts over both orders."""
    rows = read_lines(folder / ANSWERS)
    for duel in read_lines(folder / VERDICTS):
        for row, outcome in zip(rows, duel["outcomes"], strict=True):
            first, second = (_sampled(row, duel[side]) for side in ("first", "second"))
            yield Annotated(Prompt(row["prompt"], second, row["instruction"]), first, outcome)


def _sampled(row: Mapping[str, Any], label: str) -> str:
    from rlhf.models.tokenizing import Response

    return Response(row["answers"][label], (), label not in row["cut"])


def _of_simulation(row: Mapping[str, Any], template: Template | None) -> Annotated:
    """A pair of simulated preferences, with its label after noise; see `rlhf.evaluation.labelled_pairs`."""
    outcome = {"first": 1.0, "second": 0.0}.get(row["preferred"], row["outcome"])
    prompt = Prompt(row["prompt"], row["second"], strip_template(row["prompt"], template))
    return Annotated(prompt, row["first"], outcome)


def _of_alpaca_farm(row: Mapping[str, Any], template: Template | None) -> Annotated:
    """An annotation in AlpacaFarm's format: 1 prefers output_1, 2 output_2, what lies between is less sure, 0 a tie."""
    instruction, input = str(row["instruction"]), str(row.get("input") or "")
    whole = f"{instruction}\n\n{input}" if input else instruction
    prompt = template.render(instruction, input) if template else whole
    given = row["preference"]
    preference = None if given in (None, "") else float(given)
    outcome = None if preference is None else 0.5 if preference == 0 else 2 - preference
    if outcome is not None and not 0 <= outcome <= 1:
        raise ValueError(given)
    return Annotated(Prompt(prompt, str(row["output_2"]), whole), str(row["output_1"]), outcome)
