"""The sentences at the top of the page: what was found, how sure it is, and what it cost."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np

from rlhf.report.comparisons import Comparison, needed
from rlhf.report.environments import commits
from rlhf.report.further_findings import at_common_distance, differences_at_distance, length_disagreements
from rlhf.report.metric_info import metric_info
from rlhf.report.runs import Sweep
from rlhf.report.text import count, duration, listing
from rlhf.report.verdicts import best_of, listing_with_gaps, rivals_of, signed, told_from_best, value


def findings(
    sweep: Sweep,
    compared: Sequence[Comparison],
    metric: str | None,
    at_distance: Mapping[float, Sequence[Comparison]] | None = None,
) -> list[str]:
    """The sentences of the page's summary.

    Args:
        sweep: the runs.
        compared: the comparisons with SFT and those with the baseline, in whatever metric; none for a search, which has
            too many rows.
        metric: the metric to speak of; None leaves out all but the cost.
        at_distance: √KL → the comparisons with the baseline there.
    """
    if metric is None:
        return list(_cost(sweep))
    found = [*_best(sweep, metric, bool(compared))]
    for _, group in groupby(compared, key=lambda item: item.other.label):
        family = list(group)
        found += _against(sweep, [item for item in family if item.metric == metric], len(family))
    found += _meaning(sweep, compared)
    found += [*length_disagreements(sweep, metric), *at_common_distance(sweep, metric)]
    found += differences_at_distance(metric, compared, at_distance or {})
    return [*found, *_cost(sweep)]


def _best(sweep: Sweep, metric: str, tested: bool) -> Iterator[str]:
    """Which row is best in a metric, and which others can be told from it."""
    # 1. The best row; one with a run that diverged has no mean.
    rows = [row for row in sweep.rows if row.values(metric)]
    finite = [row for row in rows if np.isfinite(row.values(metric)).all()]
    info = metric_info(metric)
    if diverged := [row.label for row in rows if row not in finite]:
        has = "has" if len(diverged) == 1 else "have"
        yield f"{listing(diverged)} {has} no finite {info.name}, because a run diverged, and cannot be ranked."
    if len(finite) < 2:
        return
    sft = f"SFT: {value(sweep.rows[0], metric)}"
    if len(sweep.trained) == 1:
        yield f"“{sweep.rows[1].label}” has a mean {info.name} of {value(sweep.rows[1], metric)} ({sft})."
        return
    best, superlative, worse = best_of(finite, metric)
    first = [row.label for row in finite if value(row, metric) == value(best, metric)]
    if len(first) == len(finite):
        yield f"All {len(first)} rows have the same mean {info.name}, {value(best, metric)}."
        return
    has = "has" if len(first) == 1 else "have"
    text = f"{listing(first)} {has} the {superlative} mean {info.name}, {value(best, metric)}"
    yield f"{text}: no trained row improves on SFT." if sweep.rows[0].label in first else f"{text} ({sft})."
    # 2. The others, corrected for all pairs of rows: which row is best is known only afterwards.
    rivals, pairs = rivals_of(sweep, best, finite, metric) if tested else ([], 0)
    if rivals:
        family = f" (Holm's correction for all {pairs} pairs of rows, as the best was picked afterwards)" * (pairs > 1)
        yield f"{told_from_best(rivals, worse)}{family}."


def _against(sweep: Sweep, items: Sequence[Comparison], family: int) -> Iterator[str]:
    """What was found against SFT or the baseline in one metric; `family` comparisons were corrected together."""
    if not items:
        return
    other = items[0].other
    name = "SFT" if other is sweep.rows[0] else f"the baseline “{other.label}”"
    against = f"Against {name}" + (f" ({family} comparisons, Holm's correction)" if family > 1 else "")
    if len(items) == 1:
        yield _single(sweep, items[0], against)
        return
    ordered = sorted(items, key=lambda item: -abs(item.difference.mean))
    stand = [item for item in ordered if item.stands]
    ways = {way: [item for item in stand if item.difference.verdict == way] for way in ("higher", "lower")}
    parts = [f"{way} for {listing_with_gaps(group)}" for way, group in ways.items() if group]
    quantity, rest = metric_info(items[0].metric).name, len(items) - len(stand)
    if parts:
        remaining = "the other row does" if rest == 1 else f"the other {rest} rows do"
        text = f"{against}, {quantity} is significantly {', and '.join(parts)}"
        text += f"; {remaining} not differ significantly." if rest else "."
    else:
        text = f"{against}, no row differs significantly in {quantity}."
    falls = [item.row.label for item in ordered if item.difference.verdict != "not distinguishable" and not item.stands]
    too = " as well" if parts else ""
    yield text + (f" Without the correction, {listing(falls)} would differ{too}." if falls else "")


def _single(sweep: Sweep, item: Comparison, against: str) -> str:
    """The comparison of the only other row."""
    info, gap = metric_info(item.metric), item.difference
    name = "it" if len(sweep.trained) == 1 else f"“{item.row.label}”"
    text = f"{against}, {name} is at {signed(item, gap.mean)} {info.points}".rstrip()
    text += f" in {info.name} (95 % interval {signed(item, gap.low)} to {signed(item, gap.high)})"
    if item.stands:
        return f"{text}: the difference is significant."
    need = f" To tell a true difference of this size takes about {needed(item, sweep.unit)}." if item.need else ""
    return f"{text}: the difference is not significant.{need}"


def _meaning(sweep: Sweep, compared: Sequence[Comparison]) -> Iterator[str]:
    """What the word "significant" means here."""
    if not compared:
        return
    yield (
        "“Significant”: if rows did not differ in truth, each of these sentences would claim a difference in at most 5"
        " % of studies. What is not significant may still be a real difference that these runs are too few to show."
    )
    if all(item.single for item in compared):
        one = sweep.unit.removesuffix("s")
        yield (
            f"Each row has one {one}, so this holds for these very models on other instructions. It does not say which"
            f" method is better: another {one} may reverse it."
        )


def _cost(sweep: Sweep) -> Iterator[str]:
    """How many runs there are, and the time, memory and code that they took."""
    # a run taken over from another sweep cost nothing here
    made = [run for run in sweep.finished if not run.summary.get("same_as")]
    taken = len(sweep.finished) - len(made)
    verb = "is" if len(sweep.runs) == 1 else "are"
    text = f"{len(sweep.finished)} of {count(len(sweep.runs), 'run')} {verb} finished"
    yield text + (f", {taken} of them taken over from other sweeps." if taken else ".")
    seconds = sum(float(run.summary.get("wall_seconds") or 0) for run in made)
    peak = max((float(run.summary.get("peak_memory_bytes") or 0) for run in sweep.finished), default=0.0)
    made_by = ", ".join(commits(sweep.finished))
    yield f"Total run time {duration(seconds)}; peak memory {peak / 2**30:.1f} GiB; commit {made_by}."
