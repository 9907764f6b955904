"""Win rates corrected for length: the judge's preference if response and reference were equally long.

Source: Dubois et al. 2024, "Length-controlled AlpacaEval" (AlpacaEval 2).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize  # type: ignore[import-untyped]
from scipy.special import expit  # type: ignore[import-untyped]

Array = NDArray[np.float64]
PRIOR_PRECISION = 0.01  # of the Gaussian prior on all coefficients: 1 / C with C = 100


@dataclass(frozen=True)
class Rate:
    """A win rate and its standard error over instructions."""

    value: float
    error: float


def length_adjusted_win_rate(outcomes: Sequence[float], ours: Sequence[int], theirs: Sequence[int]) -> Rate:
    """Return the win rate at equal length, estimated from this run alone.

    The logit of a win is θ + φ tanh(Δ / sd Δ), where Δ is the difference in length in characters. The value is σ(θ). If
    every response is longer than its reference, this is an extrapolation.

    AlpacaEval calls this variant "minimal". The rate on its leaderboard also needs the difficulty of the instructions
    (`length_controlled_win_rate`), and the two differ by several points.

    Args:
        outcomes: 1 for a win, ½ for a draw, 0 for a loss, for each instruction.
        ours: The lengths of the responses in characters.
        theirs: The lengths of the reference outputs in characters.

    Raises:
        ValueError: There are no outcomes, or the lists have different lengths.
    """
    return _win_rate_at_equal_length(outcomes, ours, theirs, np.zeros(len(outcomes)))


def length_controlled_win_rate(
    outcomes: Sequence[float], ours: Sequence[int], theirs: Sequence[int], difficulty: Sequence[float]
) -> Rate:
    """Return the win rate at equal length as AlpacaEval 2 defines it ("length_controlled_v1").

    The logit of a win is θ + φ tanh(Δ / sd Δ) + ψ γ, where γ is the `difficulty` of the instruction, known from the
    answers of many models (rlhf/evaluation/difficulty.py). The value is the mean of σ(θ + ψ γ) over instructions.

    Two things differ from AlpacaEval. It regularises towards annotations of "gamed" baselines, which are left out here.
    And in place of its cross-validated L1 penalty there is a weak L2 penalty, which keeps the coefficients finite.

    Args:
        outcomes: 1 for a win, ½ for a draw, 0 for a loss, for each instruction.
        ours: The lengths of the responses in characters.
        theirs: The lengths of the reference outputs in characters.
        difficulty: γ of each instruction.

    Raises:
        ValueError: There are no outcomes, or the lists have different lengths.
    """
    return _win_rate_at_equal_length(outcomes, ours, theirs, np.asarray(difficulty, float))


def scaled_difference(ours: Sequence[int], theirs: Sequence[int]) -> Array:
    """Return tanh(Δ / sd Δ) for the length differences Δ, zeros if all of them are equal."""
    difference = np.array([a - b for a, b in zip(ours, theirs, strict=True)], float)
    spread = difference.std(ddof=1) if len(difference) > 1 else 0.0
    return np.tanh(difference / spread) if spread else np.zeros_like(difference)


def _win_rate_at_equal_length(
    outcomes: Sequence[float], ours: Sequence[int], theirs: Sequence[int], difficulty: Array
) -> Rate:
    """Fit the regression and average its predictions at Δ = 0. Zero difficulties drop out of it."""
    if not outcomes:
        raise ValueError("a win rate over no outcomes")
    wins, length = np.asarray(outcomes, float), scaled_difference(ours, theirs)
    if not len(wins) == len(length) == len(difficulty):
        raise ValueError(f"{len(wins)} outcomes, but {len(length)} lengths and {len(difficulty)} difficulties")
    features = np.stack([np.ones_like(wins), length, difficulty], axis=1)
    weights = _fit_logistic(features, wins)
    at_equal_length = features * [1.0, 0.0, 1.0]
    chances = expit(at_equal_length @ weights)
    return Rate(float(chances.mean()), _standard_error(features, wins, weights, at_equal_length, chances))


def _fit_logistic(features: Array, wins: Array) -> Array:
    """Fit a logistic regression [features] with the Gaussian prior; a draw counts half as a win, half as a loss."""

    def loss(weights: Array) -> tuple[float, Array]:
        logits = features @ weights
        value = np.logaddexp(0, logits).sum() - wins @ logits + PRIOR_PRECISION / 2 * weights @ weights
        return float(value), features.T @ (expit(logits) - wins) + PRIOR_PRECISION * weights

    weights: Array = minimize(loss, np.zeros(features.shape[1]), jac=True, method="BFGS").x
    return weights


def _standard_error(features: Array, wins: Array, weights: Array, at_equal_length: Array, chances: Array) -> float:
    """Return the standard error of the win rate by the delta method, nan if there are too few instructions.

    It is computed from each instruction's influence on the win rate, which has two parts. Its residual moves the
    coefficients; this part is a sandwich estimate, which is valid even if the logistic curve does not fit. And if
    difficulties differ, its own prediction is a term of the final mean.

    Args:
        features: [instructions, coefficients], the regression's inputs.
        wins: [instructions], the outcomes.
        weights: [coefficients], the fitted coefficients.
        at_equal_length: [instructions, coefficients], the inputs with Δ = 0.
        chances: [instructions], the predictions at Δ = 0, whose mean is the win rate.
    """
    # Coefficients of all-zero features (no difficulty) are not estimated and cost no degree of freedom.
    count, used = len(wins), int(np.any(features != 0, axis=0).sum())
    if count <= used:
        return math.nan
    fitted = expit(features @ weights)
    curvature = (features.T * (fitted * (1 - fitted))) @ features + PRIOR_PRECISION * np.eye(features.shape[1])
    slope = (chances * (1 - chances)) @ at_equal_length / count
    moved = count * (features * (wins - fitted)[:, None]) @ np.linalg.solve(curvature, slope)
    influence = moved + chances - chances.mean()
    return math.sqrt(float(influence @ influence) / (count - used) / count)
