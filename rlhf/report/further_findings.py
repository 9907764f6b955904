"""Findings that qualify the others: rows at equal distance from SFT, and win rates at equal length."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from rlhf.report.comparisons import WIN, Comparison
from rlhf.report.equal_distance import assumes_straight, at_distance, common_distances, reach
from rlhf.report.metric_info import metric_info
from rlhf.report.rows import Row
from rlhf.report.runs import Sweep
from rlhf.report.text import joined, listing
from rlhf.report.verdicts import best_of, listing_with_gaps, rivals_of, told_from_best, value
from rlhf.tracking.reading import ADJUSTED, CONTROLLED

# Where a value at a distance is interpolated between SFT and a run's first evaluation
ASSUMED = " This assumes that runs go there in a straight line from SFT: some have no evaluation before it."


def at_common_distance(sweep: Sweep, metric: str) -> Iterator[str]:
    """Which row is best at the farthest distance from SFT that all rows reach, and how sure that is."""
    nearest = min(map(reach, sweep.trained))
    far = max((distance for distance in common_distances(sweep) if distance <= nearest), default=0.0)
    rows = [row for each in sweep.trained if (row := at_distance(each, far)) and _is_finite(row, metric)]
    if not far or len(rows) < 2:
        return
    best, superlative, worse = best_of(rows, metric)
    # with a run each, interpolation between evaluations would pass for a difference
    if len({value(row, metric) for row in rows}) == 1:
        return
    rivals, _ = ([], 0) if all(row.single for row in rows) else rivals_of(sweep, best, rows, metric)
    text = (
        f"At equal distance from SFT (√KL {far:g}, the farthest of the table's that all rows reach), “{best.label}” has"
    )
    told = f". {told_from_best(rivals, worse)}" if rivals else ""
    note = ASSUMED if any(row.straight for row in rows) else ""
    yield f"{text} the {superlative} {metric_info(metric).name}, {value(best, metric)}{told}.{note}"


def differences_at_distance(
    metric: str, compared: Sequence[Comparison], found: Mapping[float, Sequence[Comparison]]
) -> Iterator[str]:
    """Which rows differ from the baseline at equal distance, and which of them did so at equal steps alone."""
    every = [item for items in found.values() for item in items]
    items = [item for item in every if item.metric == metric]
    if all(item.single for item in items):
        return
    baseline, name = items[0].other.label, metric_info(metric).name
    reached = [distance for distance, here in found.items() if any(item.metric == metric for item in here)]
    where = f"√KL {joined([f'{distance:g}' for distance in reached])}"
    parts = [
        f"{way} for {listing_with_gaps(group)} at √KL {distance:g}"
        for distance, here in found.items()
        for way in ("higher", "lower")
        if (
            group := [item for item in here if item.metric == metric and item.stands and item.difference.verdict == way]
        )
    ]
    family = f" (Holm's correction for {len(every)} comparisons)" if len(every) > 1 else ""
    if parts:
        told = [item for item in items if item.stands]
        note = ASSUMED if any(map(assumes_straight, told)) else ""
        yield f"Against “{baseline}” at equal distance, {name} is significantly {', and '.join(parts)}{family}.{note}"
        return
    text = f"Against “{baseline}” at equal distance ({where}), no row differs significantly in {name}{family}."
    rows = {item.row.label for item in items}
    own = [item for item in compared if (item.other.label, item.metric) == (baseline, metric) and item.stands]
    gone = [item.row.label for item in own if item.row.label in rows]
    if gone:
        text += (
            f" So the difference of {listing(gone)} at the end of training may come from how far the rows went rather"
            " than from how they went."
        )
    yield text


def length_disagreements(sweep: Sweep, metric: str) -> Iterator[str]:
    """Where the win rate and the win rate at equal length disagree; nothing in other metrics."""
    equal = next((name for name in (ADJUSTED, CONTROLLED) if any(row.values(name) for row in sweep.rows)), None)
    rows = [row for row in sweep.rows if equal and _is_finite(row, WIN) and _is_finite(row, equal)]
    if metric != WIN or equal is None or len(rows) < 2:
        return
    name = metric_info(equal).name
    # 1. another row is the best one
    best, other = (max(rows, key=lambda row, key=key: _mean(row, key)) for key in (WIN, equal))  # type: ignore[misc]
    if value(best, WIN) != value(other, WIN) and value(best, equal) != value(other, equal):
        yield (
            f"By the {name} another row has the highest mean: “{other.label}” ({value(other, equal)}), ahead of"
            f" “{best.label}” ({value(best, equal)})."
        )
    # 2. rows that gain on SFT by one and lose by the other
    sft = rows[0]
    if sft is not sweep.rows[0]:
        return
    plain_gains, fair_gains = ([100 * (_mean(row, key) - _mean(sft, key)) for row in rows[1:]] for key in (WIN, equal))
    gains = zip([row.label for row in rows[1:]], plain_gains, fair_gains, strict=True)
    turned = [(label, plain, fair) for label, plain, fair in gains if plain > 0 > fair]
    if turned:
        texts = [f"“{label}” ({plain:+.1f} and {fair:+.1f} points)".replace("-", "−") for label, plain, fair in turned]
        yield (
            f"Above SFT in the mean win rate, but below it in the mean {name}: {joined(texts)}. So the gain may be"
            " one of length (means alone)."
        )


def _mean(row: Row, metric: str) -> float:
    """The mean of a row over replicates."""
    return float(np.mean(row.values(metric)))


def _is_finite(row: Row, metric: str) -> bool:
    """Whether a row has a metric in all of its replicates that have any, and none of them diverged."""
    values = row.values(metric)
    return bool(values) and bool(np.isfinite(values).all())
