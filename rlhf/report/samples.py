"""Answers side by side: what the SFT model answered, and what each row answers instead, word by word."""

import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from itertools import groupby
from typing import Any, Literal, NamedTuple

from rlhf.report.runs import Sweep
from rlhf.report.tables import NOTHING, Number

PROMPTS = 6  # how many instructions are shown
KEPT = 3  # words in a row that count as unchanged between two changes
# key of a line of samples.jsonl → header and decimals of its column
SCORES = {"win": ("won", 1), "reward": ("reward", 2), "gold_utility": ("gold utility", 2)}
FACTS = "true facts"  # header of the column made of `stated` and `true`
RULE = (
    f"The first {PROMPTS} instructions of the evaluation in the order of the data, and of every row the run with the"
    " lowest seeds at its last evaluation: a fixed rule, by which nothing is picked. Beside the answer of the SFT model"
    " that the run started from, words that are new are underlined, and words that are gone are struck through."
)


class Piece(NamedTuple):
    """Words of an answer that it has in common with another, or that it has instead (new), or lacks (gone)."""

    kind: Literal["same", "new", "gone"]
    text: str


class Answer(NamedTuple):
    """An answer in pieces, and what its columns say; a column that the run did not record has “–”."""

    row: str
    pieces: list[Piece]
    scores: list[str]


class Sample(NamedTuple):
    """An instruction with its answers, the headers of their scores, and the reference answer."""

    prompt: str
    reference: str | None
    columns: list[str]
    answers: list[Answer]


def samples(sweep: Sweep, prompts: int = PROMPTS) -> list[Sample]:
    """For each of the first prompts: the answer of SFT, and that of the first run of every row (`RULE`)."""
    return [_sample(sweep, prompt) for prompt in list(sweep.finished[0].samples)[:prompts]]


def changes(before: str, after: str) -> list[Piece]:
    """How a text became another, by words; the pieces that are not gone make the second text, but for its spaces.

    Fewer than `KEPT` common words between two changes belong to these: phrases read better than single words.
    """
    old, new = (re.findall(r"\n+|\S+", text) for text in (before, after))
    spans = SequenceMatcher(None, old, new, autojunk=False).get_opcodes()

    def is_same(place: int) -> bool:
        tag, start, end, *_ = spans[place]
        return tag == "equal" and (end - start >= KEPT or place in (0, len(spans) - 1))

    pieces: list[Piece] = []
    for same, group in groupby(range(len(spans)), is_same):
        places = list(group)
        (_, a, _, c, _), (_, _, b, _, d) = spans[places[0]], spans[places[-1]]
        gone, came = " ".join(old[a:b]), " ".join(new[c:d])
        found = [Piece("same", came)] if same else [Piece("gone", gone), Piece("new", came)]
        pieces += [piece for piece in found if piece.text]
    return pieces


def _sample(sweep: Sweep, prompt: str) -> Sample:
    """One instruction."""
    found: list[tuple[str, list[Piece], Mapping[str, Any]]] = []
    for row in sweep.rows:
        steps = row.runs[0].samples.get(prompt, {})
        step = 0 if row.step == 0 else max(steps, default=0)
        # a trained row without a sample after step 0 would repeat SFT's
        if step in steps and (row.step == 0 or step > 0):
            text, start = str(steps[step]["response"]).strip(), steps.get(0)
            is_start = row.step == 0 or start is None
            pieces = [Piece("same", text)] if is_start else changes(str(start["response"]), text)  # type: ignore[index]
            found.append((row.label, pieces, steps[step]))
    lines = [line for *_, line in found]
    keys = [key for key in SCORES if any(line.get(key) is not None for line in lines)]
    has_facts = any(line.get("stated") is not None and line.get("true") is not None for line in lines)
    answers = [Answer(label, pieces, _scores(line, keys, has_facts)) for label, pieces, line in found]
    columns = [SCORES[key][0] for key in keys] + [FACTS] * has_facts
    return Sample(prompt, next((line.get("reference_output") for line in lines), None), columns, answers)


def _scores(line: Mapping[str, Any], keys: Sequence[str], has_facts: bool) -> list[str]:
    """What the columns say of an answer."""
    texts = [NOTHING if line.get(key) is None else str(Number(line[key], digits=SCORES[key][1])) for key in keys]
    if has_facts:
        known = line.get("stated") is not None and line.get("true") is not None
        texts.append(f"{line['true']:g} of {line['stated']:g}" if known else NOTHING)
    return texts
