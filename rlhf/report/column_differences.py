"""Every row against the baseline in every evaluated metric, also in those without a value per instruction."""

from collections.abc import Sequence

import numpy as np

from rlhf.report.comparisons import Comparison, compare, compared_metrics, comparisons, corrected, pair_replicates
from rlhf.report.results import columns
from rlhf.report.rows import Key, Row
from rlhf.report.runs import Sweep
from rlhf.report.statistics import Array, difference, replicates_needed


def column_differences(sweep: Sweep, against: Row) -> list[Comparison]:
    """Each row minus `against` in every column of the main table.

    The metrics in which the report compares rows are one family for Holm's correction, as in its table, and all others
    together another. Comparisons that no replicate or instruction can judge are left out.
    """
    compared = compared_metrics(sweep)
    others = [metric for metric in columns(sweep) if metric not in compared]
    return [*comparisons(sweep, against, compared), *corrected(_others(sweep, against, others))]


def _others(sweep: Sweep, against: Row, metrics: Sequence[str]) -> list[Comparison]:
    """The comparisons in further metrics, before any correction."""
    pair, found = pair_replicates(sweep), list[Comparison]()
    for metric in metrics:
        for row in sweep.trained:
            if row is not against:
                item = compare(row, against, metric, pair) or compare_values(row, against, metric, pair)
                found += [item] if item else []
    return found


def compare_values(row: Row, other: Row, metric: str, pair: bool) -> Comparison | None:
    """Compare two rows by one value per replicate, before any correction; None if neither has two replicates.

    The interval is Student's t over replicates, Welch's if they are not paired: it counts no instructions.
    """
    a, b = _by_replicate(row, metric), _by_replicate(other, metric)
    common = [key for key in row.replicates if key in a and key in b and key in other.replicates] if pair else []
    if not a or not b or max(len(a), len(b)) < 2:
        return None
    gap, unpaired, paired = difference(_repeated(a), _repeated(b), paired=False), None, len(common) > 1
    left, right = _repeated(a), _repeated(b)
    if paired:
        left, right = (_repeated({key: values[key] for key in common}) for values in (a, b))
        gap, unpaired = difference(left, right, paired=True), gap
    need = replicates_needed(left, right, paired) if gap.verdict == "not distinguishable" else None
    return Comparison(row, other, metric, gap, unpaired, need)


def _by_replicate(row: Row, metric: str) -> dict[Key, float]:
    """Replicate → the mean of its runs' finite values."""
    groups: dict[Key, list[float]] = {}
    for run in row.runs:
        value = row.value_of(run, metric)
        if value is not None and np.isfinite(value):
            groups.setdefault(run.seeds[: row.depth], []).append(value)
    return {key: float(np.mean(values)) for key, values in groups.items()}


def _repeated(values: dict[Key, float]) -> Array:
    """[replicates, 2] for statistics over replicates alone: two equal instructions add no variance of their own."""
    return np.repeat(np.array(list(values.values()))[:, None], 2, axis=1)
