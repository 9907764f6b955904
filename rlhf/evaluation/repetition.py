"""How repetitive texts are."""

import statistics
from collections.abc import Hashable, Sequence


def repeated_ngrams(rows: Sequence[Sequence[Hashable]], n: int = 4) -> float:
    """Return the mean share of n-grams in a row that already occurred earlier in that row (0 to 1).

    Rows with fewer than n tokens count as 0. Source: seq-rep-n of Welleck et al. 2020, "Neural text generation with
    unlikelihood training".
    """
    shares = []
    for row in rows:
        ngrams = list(zip(*(row[i:] for i in range(n)), strict=False))
        shares.append(1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0)
    return statistics.fmean(shares) if shares else 0.0
