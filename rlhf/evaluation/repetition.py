"""How repetitive texts are, each by itself and all of them together."""

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


def distinct_ngrams(rows: Sequence[Sequence[Hashable]], n: int = 2) -> float:
    """Return the share of distinct n-grams among the n-grams of all rows (0 to 1; 0 if there are none).

    It falls if rows resemble each other. As longer rows repeat more by chance, only sets of rows of about the same
    size can be compared. Source: distinct-n of Li et al. 2016, "A diversity-promoting objective function for neural
    conversation models", who divide by tokens.
    """
    ngrams = [ngram for row in rows for ngram in zip(*(row[i:] for i in range(n)), strict=False)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0
