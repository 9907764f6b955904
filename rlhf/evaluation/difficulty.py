"""The difficulty of each evaluation instruction, for the length-controlled win rate: read from a file, or fitted."""

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
from rlhf.evaluation.length_control import PRIOR_PRECISION, Array, scaled_difference

log = logging.getLogger(__name__)
ANNOTATIONS = "annotations.json"  # of one model, in AlpacaEval's folder of results
DIFFICULTY_KEYS = ("instruction_difficulty", "difficulty")
DIFFICULTY_PRECISION = 0.1  # of the Gaussian prior: keeps the difficulty finite if all models win an instruction
MIN_MODELS = 2
Annotation = tuple[str, float, int, int]
"""Instruction, outcome, and the lengths of the model's and of the baseline's output in characters."""


def load_difficulties(path: str, instructions: Sequence[str], used: int | None = None) -> dict[str, float]:
    """Return the difficulty of each instruction, read from a file or fitted to annotations.

    Args:
        path: One of
            - a .csv, .json or .jsonl file with `instruction_difficulty` (or `difficulty`) and `instruction`. Without
              instructions, as AlpacaEval publishes it, its rows must be in the order of the evaluation set;
            - annotations of several models against one baseline (`instruction`, `output_1`, `output_2`, `generator_2`,
              `preference`), in a file or in a folder with an `annotations.json` per model. Difficulties are fitted.
        instructions: All instructions of the evaluation set.
        used: How many of them, from the first one on, need a difficulty. None for all.

    Raises:
        DataError: The file cannot be used, or an instruction is missing in it.
    """
    rows = list(_read_rows(Path(os.path.expanduser(path))))
    name = next((name for name in DIFFICULTY_KEYS if name in rows[0][2]), None)
    if name is None:
        found = fit_difficulties(_annotations_by_model(rows))
    else:
        values = [_finite_number(file, number, row, name) for file, number, row in rows]
        if all("instruction" in row for *_, row in rows):
            found = {row["instruction"].strip(): value for (*_, row), value in zip(rows, values, strict=True)}
        elif len(values) != len(instructions):
            raise DataError(
                f"{path} has {len(values)} difficulties and no instructions beside them, but there are"
                f" {len(instructions)} evaluation instructions, so they cannot be matched."
            )
        else:
            found = {text.strip(): value for text, value in zip(instructions, values, strict=True)}
    instructions = instructions[:used]
    missing = [text for text in instructions if text.strip() not in found]
    if missing:
        raise DataError(
            f"{path} lacks {len(missing)} of the {len(instructions)} evaluation instructions; the first is"
            f" {missing[0][:80]!r}."
        )
    return {text: found[text.strip()] for text in instructions}


def fit_difficulties(annotations: Mapping[str, Sequence[Annotation]]) -> dict[str, float]:
    """Fit the difficulties γ of instructions with one logistic regression over several models.

    The logit of model m's win on instruction x is θ_m + φ_m tanh(Δ / sd Δ) + γ_x. Every model has its own strength θ_m
    and its own length effect φ_m; the difficulties γ_x are shared by all models.

    Args:
        annotations: The annotations of each model.

    Returns:
        The difficulty of each instruction.

    Raises:
        DataError: There are fewer than two models.
    """
    if len(annotations) < MIN_MODELS:
        raise DataError(f"Annotations of {len(annotations)} model give no difficulties: those of several are needed.")
    # 1. Flatten the annotations into arrays [annotations], with the indices of model and instruction.
    texts = list(dict.fromkeys(text for judged in annotations.values() for text, *_ in judged))
    index = {text: number for number, text in enumerate(texts)}
    models, count = len(annotations), len(texts)
    model = np.concatenate([np.full(len(judged), m) for m, judged in enumerate(annotations.values())])
    text = np.concatenate([[index[row[0]] for row in judged] for judged in annotations.values()])
    wins = np.concatenate([[row[1] for row in judged] for judged in annotations.values()])
    length = np.concatenate(
        [scaled_difference([row[2] for row in judged], [row[3] for row in judged]) for judged in annotations.values()]
    )

    # 2. Minimise the penalised negative log-likelihood. Dense features would need annotations × (models + instructions)
    #    numbers, so the gradient is summed by index.
    def loss(weights: Array) -> tuple[float, Array]:
        strength, slope, difficulty = np.split(weights, [models, 2 * models])
        logits = strength[model] + slope[model] * length + difficulty[text]
        residual = expit(logits) - wins
        value = np.logaddexp(0, logits).sum() - wins @ logits + DIFFICULTY_PRECISION / 2 * difficulty @ difficulty
        value += PRIOR_PRECISION / 2 * (strength @ strength + slope @ slope)
        gradient = [
            np.bincount(model, residual, models) + PRIOR_PRECISION * strength,
            np.bincount(model, residual * length, models) + PRIOR_PRECISION * slope,
            np.bincount(text, residual, count) + DIFFICULTY_PRECISION * difficulty,
        ]
        return float(value), np.concatenate(gradient)

    start = np.zeros(2 * models + count)
    weights = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 1000}).x
    return dict(zip(texts, weights[2 * models :].tolist(), strict=True))


def _read_rows(path: Path) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """Yield (file, row number, row) from a file, or from the annotations of every model below a folder."""
    files = sorted(path.rglob(ANNOTATIONS)) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} contains no {ANNOTATIONS}; allowed: a folder of annotations, or a file.")
    for file in files:
        source = Source(str(file), file)
        source.check()
        for number, row in source.rows():
            if not isinstance(row, dict):
                raise DataError(f"{file}, row {number}: {row if isinstance(row, RowError) else 'it is not an object'}.")
            yield file, number, row


def _annotations_by_model(rows: Sequence[tuple[Path, int, dict[str, Any]]]) -> dict[str, list[Annotation]]:
    """Group AlpacaEval's annotations by model. Those without a verdict or an output are dropped, with a warning."""
    found: dict[str, list[Annotation]] = {}
    left_out = 0
    for file, number, row in rows:
        missing = [
            key for key in ("instruction", "output_1", "output_2", "generator_2", "preference") if key not in row
        ]
        if missing:
            raise DataError(
                f"{file}, row {number}: it has no {missing[0]}; allowed: annotations in AlpacaEval's format, or rows"
                f" with {' or '.join(DIFFICULTY_KEYS)}."
            )
        try:
            preference = float(row["preference"])
        except (TypeError, ValueError):
            preference = math.nan
        # 1 prefers the baseline, 2 the model, a value in between is the annotator's certainty, and 0 is a draw.
        won = 0.5 if preference == 0 else preference - 1
        if not 0 <= won <= 1 or not row["output_2"]:
            left_out += 1
            continue
        judged = (str(row["instruction"]).strip(), won, len(row["output_2"]), len(row["output_1"]))
        found.setdefault(str(row["generator_2"]), []).append(judged)
    if left_out:
        log.warning("%d of %d annotations have no verdict or no output and are left out", left_out, len(rows))
    return found


def _finite_number(file: Path, number: int, row: Mapping[str, Any], name: str) -> float:
    """Return a value of a row as a float; raises DataError if it is missing or not a finite number."""
    try:
        value = float(row[name])
    except (KeyError, TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{file}, row {number}: {name} is {row.get(name)!r}, not a number.")
    return value
