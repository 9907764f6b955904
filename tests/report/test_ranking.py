"""Win rates, Bradley-Terry strengths and their intervals: by hand, by scikit-learn, and by simulation."""

import math

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from rlhf.report import ranking
from rlhf.report.ranking import ELO, PRIOR_PRECISION, bradley_terry, misfits, rank_players, unanimous, wilson, win_rate


def test_win_rates_count_a_tie_as_half_and_leave_out_what_was_not_judged() -> None:
    found = win_rate(np.array([1, 1, 0.5, 0, 0.75, np.nan]))
    assert found.rate == pytest.approx(3.25 / 5)
    assert (found.wins, found.ties, found.losses, found.unjudged) == (3, 1, 1, 1)
    nothing = win_rate(np.array([np.nan]))
    assert math.isnan(nothing.rate)
    assert math.isnan(nothing.low)


def test_wilsons_interval_by_hand() -> None:
    # z² = 3.8415, n = 10, p = 0.8: (0.8 + 0.19207) / 1.38415 ± 1.95996 / 1.38415 · √(0.016 + 0.0096036)
    assert wilson(0.8, 10) == pytest.approx((0.49016, 0.94331), abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx((0.0, 3.8415 / 13.8415), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((10 / 13.8415, 1.0), abs=1e-4)


def test_two_players_are_as_far_apart_as_the_odds() -> None:
    """30 : 10 are odds of 3, which are 400 log10(3) = 190.85 points on Elo's scale; two ties are a win and a loss."""
    theta = bradley_terry(np.array([[0.0, 30.0], [10.0, 0.0]]))
    assert ELO * (theta[0] - theta[1]) == pytest.approx(400 * math.log10(3), rel=2e-3)
    outcomes = np.array([1.0] * 28 + [0.5] * 4 + [0.0] * 8)
    one, other = rank_players(2, {(0, 1): outcomes}, resamples=50)
    assert one.strength - other.strength == pytest.approx(400 * math.log10(3), rel=2e-3)
    assert one.strength == -other.strength
    assert one.expected == pytest.approx(0.75, abs=1e-3)


def test_results_that_follow_strengths_exactly_give_these_strengths() -> None:
    theta = np.array([1.2, 0.3, -0.4, -1.1])
    wins = 1000 * expit(theta[:, None] - theta) * (1 - np.eye(4))
    np.testing.assert_allclose(bradley_terry(wins), theta, atol=1e-3)


def test_strengths_are_those_of_a_logistic_regression() -> None:
    rng = np.random.default_rng(0)
    wins = rng.integers(1, 30, (5, 5)) * (1 - np.eye(5))
    wins[3, 4] = wins[4, 3] = 0  # a pair that never met
    pairs = [(i, j) for i in range(5) for j in range(5) if wins[i, j]]
    rows = np.array([[(k == i) - (k == j) for k in range(5)] for i, j in pairs], float)
    weights = np.array([wins[pair] for pair in pairs])
    # with each row once as won and once, turned round, as lost, both classes occur
    model = LogisticRegression(C=1 / PRIOR_PRECISION, fit_intercept=False, tol=1e-10, max_iter=1000)
    model.fit(np.concatenate([rows, -rows]), [1] * len(rows) + [0] * len(rows), np.tile(weights / 2, 2))
    np.testing.assert_allclose(bradley_terry(wins), model.coef_[0], atol=1e-5)


def test_fits_are_independent_of_each_other() -> None:
    rng = np.random.default_rng(1)
    wins = rng.integers(0, 200, (20, 4, 4)) * (1 - np.eye(4))
    together = bradley_terry(wins)
    np.testing.assert_allclose(together, [bradley_terry(one) for one in wins], atol=1e-8)


def test_a_player_that_always_wins_has_a_finite_strength_and_the_first_rank() -> None:
    outcomes = {(0, 1): np.zeros(50), (0, 2): np.full(50, 0.5), (1, 2): np.ones(50)}
    ranks = rank_players(3, outcomes, resamples=200)
    assert [one.rank for one in ranks] == [2, 1, 2]
    assert math.isfinite(ranks[1].high)
    assert (ranks[1].best, ranks[1].worst, ranks[1].first) == (1, 1, 1.0)
    assert ranks[0].strength == pytest.approx(ranks[2].strength)
    assert unanimous(3, outcomes) == [1]


def test_a_circle_is_named_as_a_misfit() -> None:
    """A beats B, B beats C and C beats A: all strengths are equal, and no pair is as they say."""
    won = np.array([1.0] * 45 + [0.0] * 5)
    outcomes = {(0, 1): won, (1, 2): won, (0, 2): 1 - won}
    ranks = rank_players(3, outcomes, resamples=50)
    assert [one.strength for one in ranks] == pytest.approx([0, 0, 0], abs=1e-6)
    assert [(i, j) for i, j, _ in misfits(ranks, outcomes)] == [(0, 1), (1, 2), (0, 2)]
    assert not misfits(rank_players(2, {(0, 1): won}, resamples=50), {(0, 1): won})


STRENGTHS = np.array([0.8, 0.3, -0.2, -0.9])
HARD = 1.0  # standard deviation of a player's luck with an instruction, in all of its comparisons there


def simulated(rng: np.random.Generator, instructions: int) -> ranking.Outcomes:
    """Comparisons in which a player is better at some instructions than at others, and a fifth are ties."""
    luck = rng.normal(0, HARD, (4, instructions))
    outcomes = {}
    for i in range(4):
        for j in range(i + 1, 4):
            chance = expit(STRENGTHS[i] - STRENGTHS[j] + luck[i] - luck[j])
            won = (rng.random(instructions) < chance).astype(float)
            outcomes[i, j] = np.where(rng.random(instructions) < 0.2, 0.5, won)
    return outcomes


def test_intervals_of_strengths_hold_the_truth_in_95_percent_of_simulations() -> None:
    """The truth is the fit to very many instructions. Drawing comparisons instead of instructions would be too sure."""
    rng = np.random.default_rng(0)
    truth = [one.strength for one in rank_players(4, simulated(rng, 400_000), resamples=1)]
    held, ordered = [], []
    for _ in range(400):
        ranks = rank_players(4, simulated(rng, 100), seed=1, resamples=300)
        held += [one.low <= true <= one.high for one, true in zip(ranks, truth, strict=True)]
        ordered += [one.best <= true <= one.worst for one, true in zip(ranks, (1, 2, 3, 4), strict=True)]
    print(f"strengths: {np.mean(held):.3f}, ranks: {np.mean(ordered):.3f}")
    assert 0.925 <= np.mean(held) <= 0.97
    assert np.mean(ordered) >= 0.95


def test_win_rate_intervals_hold_the_truth() -> None:
    """Wilson's interval for wins and losses; with ties it is wider than need be."""
    rng = np.random.default_rng(0)
    for ties, truth in ((0.0, 0.9), (0.3, 0.15 + 0.7 * 0.9)):
        held = []
        for _ in range(2000):
            outcomes = np.where(rng.random(60) < ties, 0.5, rng.random(60) < 0.9)
            found = win_rate(outcomes)
            held.append(found.low <= truth <= found.high)
        assert np.mean(held) >= 0.93
