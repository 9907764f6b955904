"""How hard each evaluation instruction is, for the length-controlled win rate: read from a file, or fitted."""

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize  # type: ignore[import-untyped]
from scipy.special import expit  # type: ignore[import-untyped]

from rlhf.data.sources import Source
from rlhf.errors import DataError, RowError
from rlhf.evaluation.length_control import PRECISION, Array, scaled_difference

log = logging.getLogger(__name__)
ANNOTATIONS = "annotations.json"  # of each model, below a folder of AlpacaEval's results
NAMES = ("instruction_difficulty", "difficulty")
SHRINKAGE = 0.1  # precision of the Gaussian prior on difficulties: an instruction that all models win stays finite
FEWEST_MODELS = 2
Judged = tuple[str, float, int, int]  # instruction, outcome, length of the model's output, length of the baseline's


def difficulties(path: str, instructions: Sequence[str], used: int | None = None) -> dict[str, float]:
    """The difficulty of the first `used` of the evaluation set's instructions (None: of all).

    `path` names a .csv, .json or .jsonl with `instruction_difficulty` (or `difficulty`) and `instruction`, or, as
    AlpacaEval publishes them, without instructions and in the evaluation set's order; or annotations of several models
    against one baseline (`instruction`, `output_1`, `output_2`, `generator_2`, `preference`) in a file or in a folder
    that holds an `annotations.json` for each model, from which the difficulties are fitted.

    Raises:
        DataError: the file cannot be used, or lacks an instruction.
    """
    rows = list(_rows(Path(os.path.expanduser(path))))
    name = next((name for name in NAMES if name in rows[0][2]), None)
    if name is None:
        found = fitted(_by_model(rows))
    else:
        values = [_number(file, number, row, name) for file, number, row in rows]
        if all("instruction" in row for *_, row in rows):
            found = {row["instruction"].strip(): value for (*_, row), value in zip(rows, values, strict=True)}
        elif len(values) != len(instructions):
            raise DataError(
                f"{path} has {len(values)} difficulties and no instructions beside them, but there are"
                f" {len(instructions)} evaluation instructions: which is whose cannot be told."
            )
        else:
            found = {text.strip(): value for text, value in zip(instructions, values, strict=True)}
    instructions = instructions[:used]
    missing = [text for text in instructions if text.strip() not in found]
    if missing:
        raise DataError(
            f"{path} says nothing of {len(missing)} of the {len(instructions)} evaluation instructions; the first is"
            f" {missing[0][:80]!r}."
        )
    return {text: found[text.strip()] for text in instructions}


def fitted(annotations: Mapping[str, Sequence[Judged]]) -> dict[str, float]:
    """The difficulties γ of instructions by a logistic regression over several models at once.

    The logit of model m's win on instruction x is θ_m + φ_m tanh(Δ / sd Δ) + γ_x: every model has its own strength and
    its own length effect, and shares the instructions' difficulties with the others.

    Raises:
        DataError: there are fewer than two models.
    """
    if len(annotations) < FEWEST_MODELS:
        raise DataError(f"Annotations of {len(annotations)} model tell no difficulties: those of several are needed.")
    texts = list(dict.fromkeys(text for judged in annotations.values() for text, *_ in judged))
    place = {text: number for number, text in enumerate(texts)}
    models, count = len(annotations), len(texts)
    model = np.concatenate([np.full(len(judged), m) for m, judged in enumerate(annotations.values())])
    text = np.concatenate([[place[row[0]] for row in judged] for judged in annotations.values()])
    wins = np.concatenate([[row[1] for row in judged] for judged in annotations.values()])
    length = np.concatenate(
        [scaled_difference([row[2] for row in judged], [row[3] for row in judged]) for judged in annotations.values()]
    )

    def loss(weights: Array) -> tuple[float, Array]:
        strength, slope, difficulty = np.split(weights, [models, 2 * models])
        logits = strength[model] + slope[model] * length + difficulty[text]
        rest = expit(logits) - wins
        value = np.logaddexp(0, logits).sum() - wins @ logits + SHRINKAGE / 2 * difficulty @ difficulty
        value += PRECISION / 2 * (strength @ strength + slope @ slope)
        gradient = [
            np.bincount(model, rest, models) + PRECISION * strength,
            np.bincount(model, rest * length, models) + PRECISION * slope,
            np.bincount(text, rest, count) + SHRINKAGE * difficulty,
        ]
        return float(value), np.concatenate(gradient)

    start = np.zeros(2 * models + count)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 1000}).x
    return dict(zip(texts, found[2 * models :].tolist(), strict=True))


def _rows(path: Path) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """(file, row number, row) of a file or of every model's annotations below a folder."""
    files = sorted(path.rglob(ANNOTATIONS)) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no {ANNOTATIONS}: name a folder of annotations or a file.")
    for file in files:
        source = Source(str(file), file)
        source.check()
        for number, row in source.rows():
            if not isinstance(row, dict):
                raise DataError(f"{file}, row {number}: {row if isinstance(row, RowError) else 'it is no object'}.")
            yield file, number, row


def _by_model(rows: Sequence[tuple[Path, int, dict[str, Any]]]) -> dict[str, list[Judged]]:
    """AlpacaEval's annotations by model; those without a verdict or an answer are left out, and counted."""
    found: dict[str, list[Judged]] = {}
    left_out = 0
    for file, number, row in rows:
        missing = [
            key for key in ("instruction", "output_1", "output_2", "generator_2", "preference") if key not in row
        ]
        if missing:
            raise DataError(
                f"{file}, row {number}: it has no {missing[0]}; allowed: annotations as AlpacaEval's, or rows with"
                f" {' or '.join(NAMES)}."
            )
        try:
            preference = float(row["preference"])
        except (TypeError, ValueError):
            preference = math.nan
        won = 0.5 if preference == 0 else preference - 1  # 1: the baseline, 2: the model, between: as sure as that
        if not 0 <= won <= 1 or not row["output_2"]:
            left_out += 1
            continue
        judged = (str(row["instruction"]).strip(), won, len(row["output_2"]), len(row["output_1"]))
        found.setdefault(str(row["generator_2"]), []).append(judged)
    if left_out:
        log.warning("%d of %d annotations have no verdict or no answer and are left out", left_out, len(rows))
    return found


def _number(file: Path, number: int, row: Mapping[str, Any], name: str) -> float:
    try:
        value = float(row[name])
    except (KeyError, TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{file}, row {number}: {name} is {row.get(name)!r}, not a number.")
    return value
