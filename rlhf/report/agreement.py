"""How far two judges agree on the same pairs: accuracy and Cohen's κ (1960), with intervals.

A verdict is one of three: the first answer is better, the second, or a tie. Several pairs of one instruction are not
independent, so that the bootstrap draws whole instructions, and the accuracy's interval counts as many pairs as would
vary as much if they were independent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import cohen_kappa_score

from rlhf.report.ranking import LEVEL, wilson

Array = NDArray[np.float64]
RESAMPLES = 1000


@dataclass(frozen=True)
class Agreement:
    """The agreement of two judges.

    Attributes:
        pairs: that both judged.
        unjudged: that one of them did not.
        ties: verdicts of either judge that are a tie, as a pair of counts.
        accuracy: the share of pairs with the same verdict, with its 95 % interval.
        decided: the same among the pairs of which neither says that they are a tie.
        kappa: (accuracy − chance) / (1 − chance), where chance is the accuracy of independent verdicts with the same
            frequencies; with its 95 % interval. NaN if one verdict alone occurs.
    """

    pairs: int
    unjudged: int
    ties: tuple[int, int]
    accuracy: tuple[float, float, float]
    decided: tuple[float, float, float]
    kappa: tuple[float, float, float]


def agreement(
    first: Sequence[float | None],
    second: Sequence[float | None],
    instructions: Sequence[str],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Agreement:
    """Compare the outcomes of two judges: above ½ the first answer is better, below it the second; None: no verdict.

    Args:
        first: the outcomes of one judge.
        second: those of the other.
        instructions: what the answers of each pair answer.
        seed: of the resamples.
        resamples: how many.
    """
    judged = [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a is not None and b is not None]
    a, b = (np.sign([float(side[i] or 0) - 0.5 for i in judged]).astype(int) for side in (first, second))
    groups = np.unique([instructions[i] for i in judged], return_inverse=True)[1].reshape(-1)
    both = (a != 0) & (b != 0)
    return Agreement(
        pairs=len(judged),
        unjudged=len(first) - len(judged),
        ties=(int((a == 0).sum()), int((b == 0).sum())),
        accuracy=share_interval((a == b).astype(float), groups),
        decided=share_interval((a == b)[both].astype(float), groups[both]),
        kappa=_kappa_interval(a, b, groups, seed, resamples),
    )


def share_interval(hits: Array, groups: NDArray[np.intp]) -> tuple[float, float, float]:
    """The mean of hits (0 or 1) with Wilson's 95 % interval at the effective number of independent cases.

    That number is p (1 − p) / variance of the mean, where the variance is that over groups; at most the number of hits,
    and the number of groups where there is no variance to estimate it by.
    """
    if not len(hits):
        return math.nan, math.nan, math.nan
    share = float(hits.mean())
    sums = np.bincount(groups, hits - share)
    count = len(np.unique(groups))
    variance = float((sums**2).sum()) / len(hits) ** 2 * count / max(count - 1, 1)
    effective = min(share * (1 - share) / variance, len(hits)) if variance > 0 else count
    return share, *wilson(share, effective)


def _kappa_interval(
    a: NDArray[np.int_], b: NDArray[np.int_], groups: NDArray[np.intp], seed: int, resamples: int
) -> tuple[float, float, float]:
    """κ with its percentile interval over resampled groups."""
    if not len(a):
        return math.nan, math.nan, math.nan
    # [groups, verdicts, verdicts]: how often each pair of verdicts occurs
    counts = np.zeros((int(groups.max()) + 1, 3, 3))
    np.add.at(counts, (groups, a + 1, b + 1), 1)
    share = np.full(len(counts), 1 / len(counts))
    weights = np.random.default_rng(seed).multinomial(len(counts), share, size=resamples)
    drawn = _kappas(np.tensordot(weights, counts, 1))
    found = drawn[~np.isnan(drawn)]
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(found) else (math.nan, math.nan)
    alone = len({*a.tolist(), *b.tolist()}) == 1  # scikit-learn would warn
    return math.nan if alone else float(cohen_kappa_score(a, b)), float(low), float(high)


def _kappas(counts: Array) -> Array:
    """Cohen's κ of tables of counts [tables, verdicts, verdicts]; NaN where one verdict alone occurs."""
    shares = counts / counts.sum((1, 2), keepdims=True)
    equal, chance = np.trace(shares, axis1=1, axis2=2), (shares.sum(1) * shares.sum(2)).sum(1)
    return np.divide(equal - chance, 1 - chance, out=np.full(len(counts), math.nan), where=chance < 1 - 1e-12)
