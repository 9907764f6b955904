"""The sentences at the top of the page: what was found, and what it cost."""

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

from rlhf.report.comparisons import Comparison, compare, corrected, pair_replicates
from rlhf.report.equal_distance import at_distance, common_distances, reach
from rlhf.report.metric_info import metric_info
from rlhf.report.rows import Row
from rlhf.report.runs import Sweep
from rlhf.report.text import count, duration, quoted


def findings(sweep: Sweep, compared: Sequence[Comparison], metric: str | None) -> list[str]:
    """The sentences of the page's summary.

    Args:
        sweep: the runs.
        compared: every comparison with the baseline, in whatever metric.
        metric: the metric to speak of; None leaves out all but the cost.
    """
    found = [*_results(sweep, compared, metric), *_at_equal_distance(sweep, metric)] if metric else []
    return [*found, *_cost(sweep)]


def _results(sweep: Sweep, compared: Sequence[Comparison], metric: str) -> Iterator[str]:
    """What was found in one metric."""
    # 1. The best row, and the rows that are significantly worse.
    best = max(sweep.trained, key=lambda row: float(np.mean(row.values(metric) or [-np.inf])))
    name, sft = metric_info(metric).name, _value(sweep.rows[0], metric)
    yield f"Highest {name}: “{best.label}”, {_value(best, metric)} (SFT: {sft})."
    rivals, pairs = _rivals(sweep, best, sweep.rows, metric)
    if rivals:
        lower = [item.row.label for item in rivals if item.difference.verdict == "lower" and item.stands]
        same = [item.row.label for item in rivals if item.row.label not in lower]
        text = f"Of the {len(rivals)} other rows, {_names(lower)} can be distinguished as lower"
        text += f"; {_names(same)} cannot" if same else ""
        yield f"{text} (Holm's correction for all {count(pairs, 'pair')} of rows, as the best was picked afterwards)."
    # 2. Every row against the baseline.
    in_metric = [item for item in compared if item.metric == metric]
    if in_metric:
        parts = []
        for verdict in ("higher", "lower", "not distinguishable"):
            labels = [item.row.label for item in in_metric if item.difference.verdict == verdict]
            if labels:
                parts.append(f"{verdict}: {quoted(labels)}")
        yield f"Against the baseline “{in_metric[0].other.label}” — {'; '.join(parts)}."
        claims = [item for item in in_metric if item.difference.verdict != "not distinguishable"]
        if claims:
            # the family of the correction includes the comparisons in other metrics
            standing = sum(item.stands for item in claims)
            family = f"Holm's correction for {count(len(compared), 'comparison')}"
            yield f"Of {count(len(claims), 'verdict')} that name a direction, {family} leaves {standing}."


def _at_equal_distance(sweep: Sweep, metric: str) -> Iterator[str]:
    """Which row is best at the farthest distance from SFT that all rows reach, and how sure that is."""
    nearest = min(map(reach, sweep.trained))
    far = max((distance for distance in common_distances(sweep) if distance <= nearest), default=0.0)
    rows = [row for each in sweep.trained if (row := at_distance(each, far)) and row.values(metric)]
    if not far or len(rows) < 2:
        return
    best = max(rows, key=lambda row: float(np.mean(row.values(metric))))
    rivals, _ = _rivals(sweep, best, rows, metric)
    lower = [item.row.label for item in rivals if item.difference.verdict == "lower" and item.stands]
    yield (
        f"At √KL {far:g}, the farthest of the common distances that all rows reach, the highest"
        f" {metric_info(metric).name} is that of “{best.label}”, {_value(best, metric)}; of the"
        f" {count(len(rivals), 'other row')}, {_names(lower)} can be distinguished as lower."
    )


def _rivals(sweep: Sweep, best: Row, rows: Sequence[Row], metric: str) -> tuple[list[Comparison], int]:
    """The comparisons with the best row, corrected for all pairs of rows, and the number of these.

    Which row is best is known only afterwards, so that a family of its comparisons alone would be too small.
    """
    pairs = [(row, best) for row in rows if row is not best]
    pairs += combinations([row for row, _ in pairs], 2)
    found = [compare(row, other, metric, pair_replicates(sweep)) for row, other in pairs]
    family = corrected([item for item in found if item])
    return [item for item in family if item.other is best], len(family)


def _cost(sweep: Sweep) -> Iterator[str]:
    """How many runs there are, and the time, memory and code that they took."""
    # a run taken over from another sweep cost nothing here
    made = [run for run in sweep.finished if not run.summary.get("same_as")]
    taken = len(sweep.finished) - len(made)
    text = f"{len(sweep.finished)} of {len(sweep.runs)} runs are finished"
    yield text + (f", {taken} of them taken over from other sweeps." if taken else ".")
    seconds = sum(float(run.summary.get("wall_seconds") or 0) for run in made)
    peak = max((float(run.summary.get("peak_memory_bytes") or 0) for run in sweep.finished), default=0.0)
    commits = sorted({str(run.summary.get("git_commit") or "unknown") for run in sweep.finished})
    yield f"Total run time {duration(seconds)}; peak memory {peak / 2**30:.1f} GiB; commit {', '.join(commits)}."


def _value(row: Row, metric: str) -> str:
    """A row's mean in a metric, with its unit."""
    info, values = metric_info(metric), row.values(metric)
    return f"{info.scale * float(np.mean(values)):.{info.digits}f} {info.unit}".strip() if values else "unknown"


def _names(labels: Sequence[str]) -> str:
    """The number of rows with their labels."""
    return f"{len(labels)} ({quoted(labels)})" if labels else "none"
