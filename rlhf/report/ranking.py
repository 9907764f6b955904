"""Ranks policies by comparisons of each with each: win rates, and strengths by the model of Bradley and Terry (1952).

In that model, i beats j with probability σ(θ_i − θ_j). A tie counts as half a win for either side: with θ' = θ, that is
the likelihood of the average verdict, which needs no parameter for ties (unlike Davidson's) and covers verdicts in
between, such as the mean of several votes.

Instructions are the sample: an instruction that is hard for one player is hard for another, so that the bootstrap draws
whole instructions, with all comparisons on them. Players are fixed: another training run would give another player.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, ndtri  # type: ignore[import-untyped]

Array = NDArray[np.float64]
Outcomes = Mapping[tuple[int, int], Array]
"""(i, j) → [instructions]: 1 where player i beat player j, ½ for a tie, 0 for a loss, NaN without a verdict."""
ELO = 400 / math.log(10)  # points on Elo's scale per unit of θ: 400 points are odds of ten to one
PRIOR_PRECISION = 0.01  # of the Gaussian prior on θ, which keeps it finite for a player that wins or loses everything
NEWTON_STEPS, LARGEST_STEP, PRECISION = 200, 1.0, 1e-10
EQUAL = 1e-6  # points by which two strengths must differ to be told apart
LEVEL = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class WinRate:
    """How player i fares against player j: the win rate with its interval, and the verdicts that it is made of."""

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    unjudged: int


@dataclass(frozen=True)
class Rank:
    """A player's place in the ranking.

    Attributes:
        strength: points on Elo's scale; all players have 0 on average.
        low: lower end of the strength's 95 % interval.
        high: upper end.
        rank: from 1, the strongest; equal players have the same.
        best: the best rank within the 95 % interval.
        worst: the worst rank in it.
        first: how often the player is the strongest among the resamples.
        expected: the mean win rate against the other players that the strengths predict.
    """

    strength: float
    low: float
    high: float
    rank: int
    best: int
    worst: int
    first: float
    expected: float


def win_rate(outcomes: Array) -> WinRate:
    """The win rate of outcomes [instructions] with Wilson's 95 % interval; NaN if nothing was judged.

    Ties vary less than wins and losses do, so with many of them the interval is wider than it need be.
    """
    judged = outcomes[~np.isnan(outcomes)]
    rate = float(judged.mean()) if len(judged) else math.nan
    ties = int((judged == 0.5).sum())
    wins = int((judged > 0.5).sum())
    unjudged = len(outcomes) - len(judged)
    return WinRate(rate, *wilson(rate, len(judged)), wins, ties, len(judged) - wins - ties, unjudged)


def wilson(share: float, count: float) -> tuple[float, float]:
    """The 95 % interval of a share among `count` independent cases (Wilson 1927); NaN without cases.

    At 0 and 1 it has a width, unlike the share ± its standard error.
    """
    if not count > 0:
        return math.nan, math.nan
    z = float(ndtri((1 + LEVEL) / 2))
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def bradley_terry(wins: Array) -> Array:
    """The strengths θ [..., players] that make the results most likely, 0 on average.

    Args:
        wins: [..., players, players]: how often the player of the row beat that of the column, ties counting ½.
            Leading axes are independent fits.
    """
    players = wins.shape[-1]
    theta = np.zeros(wins.shape[:-1])
    games = wins + np.swapaxes(wins, -1, -2)
    prior = PRIOR_PRECISION * np.eye(players)
    for _ in range(NEWTON_STEPS):
        expected = expit(theta[..., :, None] - theta[..., None, :])
        slope = (wins - games * expected).sum(-1) - PRIOR_PRECISION * theta
        weight = games * expected * (1 - expected)
        curvature = np.eye(players) * weight.sum(-1)[..., None] - weight + prior
        step = np.linalg.solve(curvature, slope[..., None])[..., 0]
        largest = np.abs(step).max(-1, keepdims=True)
        theta = theta + step * np.minimum(1, LARGEST_STEP / np.maximum(largest, PRECISION))
        if largest.max() < PRECISION:
            break
    return theta - theta.mean(-1, keepdims=True)


def rank_players(players: int, outcomes: Outcomes, seed: int = 0, resamples: int = RESAMPLES) -> list[Rank]:
    """The strength of each player with its bootstrap interval (percentiles over resampled instructions).

    Args:
        players: how many there are.
        outcomes: of each pair, on the same instructions in the same order.
        seed: of the resamples.
        resamples: how many.
    """
    count = len(next(iter(outcomes.values())))
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)
    theta = ELO * bradley_terry(_wins(players, outcomes, np.ones((1, count))))[0]
    drawn = ELO * bradley_terry(_wins(players, outcomes, weights))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    places = _places(drawn)
    best, worst = np.quantile(places, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0, method="nearest")
    rank = _places(theta)
    fitted = expit((theta[:, None] - theta) / ELO)
    expected = (fitted.sum(1) - 0.5) / max(players - 1, 1)
    first = (places == 1).mean(0)
    return [
        Rank(
            strength=float(theta[i]),
            low=float(low[i]),
            high=float(high[i]),
            rank=int(rank[i]),
            best=int(best[i]),
            worst=int(worst[i]),
            first=float(first[i]),
            expected=float(expected[i]),
        )
        for i in range(players)
    ]


def misfits(ranks: list[Rank], outcomes: Outcomes) -> list[tuple[int, int, float]]:
    """Pairs (i, j, predicted win rate) whose win rate the strengths do not explain: it is outside of the interval.

    They show that no single strength per player describes the results, as when A beats B, B beats C and C beats A.
    """
    found = []
    for (i, j), results in outcomes.items():
        predicted = float(expit((ranks[i].strength - ranks[j].strength) / ELO))
        observed = win_rate(results)
        if predicted < observed.low or predicted > observed.high:
            found.append((i, j, predicted))
    return found


def unanimous(players: int, outcomes: Outcomes) -> list[int]:
    """Players that won all of their comparisons or lost all of them, so that their strength is only a bound."""
    wins = _wins(players, outcomes, np.ones((1, len(next(iter(outcomes.values()))))))[0]
    return [i for i in range(players) if (wins[i].sum() == 0) != (wins[:, i].sum() == 0)]


def _places(strengths: Array) -> NDArray[np.int_]:
    """[..., players]: 1 + the number of players that are stronger, by more than the fit's precision."""
    return 1 + (strengths[..., None, :] > strengths[..., :, None] + EQUAL).sum(-1)


def _wins(players: int, outcomes: Outcomes, weights: Array) -> Array:
    """[resamples, players, players]: the wins of each pair, over instructions weighted by [resamples, instructions]."""
    wins = np.zeros((len(weights), players, players))
    for (i, j), results in outcomes.items():
        judged = ~np.isnan(results)
        won = weights[:, judged] @ results[judged]
        wins[:, i, j] += won
        wins[:, j, i] += weights[:, judged].sum(1) - won
    return wins
