"""What the judge would say if response and reference were equally long (Dubois et al. 2024, AlpacaEval 2)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize  # type: ignore[import-untyped]
from scipy.special import expit  # type: ignore[import-untyped]

Array = NDArray[np.float64]
PRECISION = 0.01  # of the Gaussian prior on all coefficients: 1 / C with C = 100


@dataclass(frozen=True)
class Rate:
    """A win rate and its standard error over instructions."""

    value: float
    error: float


def length_adjusted_win_rate(outcomes: Sequence[float], ours: Sequence[int], theirs: Sequence[int]) -> Rate:
    """The win rate at equal length from this run alone: σ(constant) of a logistic regression on length.

    The regression has a constant and tanh(Δ / sd Δ), Δ the difference in length in characters. AlpacaEval calls this
    variant "minimal"; its leaderboard's rate needs the difficulty of the instructions (`length_controlled_win_rate`),
    and the two differ by several points. If every response is longer than its reference, this extrapolates.

    Raises:
        ValueError: no outcomes, or lists of different lengths.
    """
    return _rate(outcomes, ours, theirs, np.zeros(len(outcomes)))


def length_controlled_win_rate(
    outcomes: Sequence[float], ours: Sequence[int], theirs: Sequence[int], difficulty: Sequence[float]
) -> Rate:
    """The win rate at equal length as AlpacaEval 2 defines it ("length_controlled_v1").

    The logit of a win is θ + φ tanh(Δ / sd Δ) + ψ γ, with γ the `difficulty` of the instruction, which is known from
    the answers of many models (rlhf/evaluation/difficulty.py); the value is the mean of σ(θ + ψ γ) over instructions.
    Left out are the annotations of "gamed" baselines towards which AlpacaEval regularises; instead of its
    cross-validated L1 penalty there is a weak L2 penalty, which keeps the coefficients finite.

    Raises:
        ValueError: no outcomes, or lists of different lengths.
    """
    return _rate(outcomes, ours, theirs, np.asarray(difficulty, float))


def scaled_difference(ours: Sequence[int], theirs: Sequence[int]) -> Array:
    """tanh(Δ / sd Δ) of the lengths; zeros where all differ by the same."""
    difference = np.array([a - b for a, b in zip(ours, theirs, strict=True)], float)
    spread = difference.std(ddof=1) if len(difference) > 1 else 0.0
    return np.tanh(difference / spread) if spread else np.zeros_like(difference)


def _rate(outcomes: Sequence[float], ours: Sequence[int], theirs: Sequence[int], difficulty: Array) -> Rate:
    if not outcomes:
        raise ValueError("a win rate over no outcomes")
    wins, length = np.asarray(outcomes, float), scaled_difference(ours, theirs)
    if not len(wins) == len(length) == len(difficulty):
        raise ValueError(f"{len(wins)} outcomes, but {len(length)} lengths and {len(difficulty)} difficulties")
    features = np.stack([np.ones_like(wins), length, difficulty], axis=1)
    weights = _fit(features, wins)
    at_equal_length = features * [1.0, 0.0, 1.0]
    chances = expit(at_equal_length @ weights)
    return Rate(float(chances.mean()), _error(features, wins, weights, at_equal_length, chances))


def _fit(features: Array, wins: Array) -> Array:
    """Logistic regression; an outcome of a half weighs in on both sides."""

    def loss(weights: Array) -> tuple[float, Array]:
        logits = features @ weights
        value = np.logaddexp(0, logits).sum() - wins @ logits + PRECISION / 2 * weights @ weights
        return float(value), features.T @ (expit(logits) - wins) + PRECISION * weights

    found: Array = minimize(loss, np.zeros(features.shape[1]), jac=True, method="BFGS").x
    return found


def _error(features: Array, wins: Array, weights: Array, at_equal_length: Array, chances: Array) -> float:
    """Standard error by the delta method, from each instruction's influence on the value; nan for too few.

    An instruction counts twice: by its residual, which moves the coefficients (a sandwich estimate, so that it holds
    also where the logistic curve does not fit), and, where difficulties differ, by its place in the final mean.
    """
    count, used = len(wins), int(np.any(features != 0, axis=0).sum())
    if count <= used:
        return math.nan
    fitted = expit(features @ weights)
    curvature = (features.T * (fitted * (1 - fitted))) @ features + PRECISION * np.eye(features.shape[1])
    slope = (chances * (1 - chances)) @ at_equal_length / count
    moved = count * (features * (wins - fitted)[:, None]) @ np.linalg.solve(curvature, slope)
    influence = moved + chances - chances.mean()
    return math.sqrt(float(influence @ influence) / (count - used) / count)
