"""The summary at the head of the page, in plain words."""

from collections.abc import Iterator, Sequence

import numpy as np

from rlhf.report.measures import measure
from rlhf.report.results import Comparison, comparisons
from rlhf.report.runs import Row, Sweep


def summary(sweep: Sweep, found: Sequence[Comparison], metric: str | None) -> list[str]:
    """What was found (in the first compared metric), and what it cost."""
    said = list(_findings(sweep, found, metric)) if metric else []
    return [*said, *_cost(sweep)]


def _findings(sweep: Sweep, found: Sequence[Comparison], metric: str) -> Iterator[str]:
    best = max(sweep.trained, key=lambda row: float(np.mean(row.values(metric) or [-np.inf])))
    words = measure(metric)
    yield f"Highest {words.name}: “{best.label}”, {_value(best, metric)} (SFT: {_value(sweep.rows[0], metric)})."
    rivals = comparisons(sweep, best, [metric])
    if rivals:
        lower = [item.row.label for item in rivals if item.difference.verdict == "lower" and item.stands]
        same = [item.row.label for item in rivals if item.row.label not in lower]
        text = f"Of the {len(rivals)} other rows, {_names(lower)} can be told to lie below it"
        text += f"; {_names(same)} cannot" if same else ""
        yield f"{text} (Holm's correction for {count(len(rivals), 'comparison')}; the best was picked after the fact)."
    ours = [item for item in found if item.metric == metric]
    if ours:
        parts = []
        for verdict in ("higher", "lower", "not distinguishable"):
            labels = [item.row.label for item in ours if item.difference.verdict == verdict]
            if labels:
                parts.append(f"{verdict}: {quoted(labels)}")
        yield f"Against the baseline “{ours[0].other.label}” — {'; '.join(parts)}."
        claims = [item for item in ours if item.difference.verdict != "not distinguishable"]
        standing = sum(item.stands for item in claims)
        if claims:
            family = f"Holm's correction for {count(len(found), 'comparison')}"
            yield f"Of {count(len(claims), 'verdict')} that name a direction, {family} leaves {standing}."


def _cost(sweep: Sweep) -> Iterator[str]:
    made = [run for run in sweep.finished if not run.summary.get("same_as")]
    taken = len(sweep.finished) - len(made)
    text = f"{len(sweep.finished)} of {len(sweep.runs)} runs are finished"
    yield text + (f", {taken} of them taken over from other sweeps." if taken else ".")
    seconds = sum(float(run.summary.get("wall_seconds") or 0) for run in made)
    peak = max((float(run.summary.get("peak_memory_bytes") or 0) for run in sweep.finished), default=0.0)
    commits = sorted({str(run.summary.get("git_commit") or "unknown") for run in sweep.finished})
    yield f"Run time in all {duration(seconds)}; peak memory {peak / 2**30:.1f} GiB; commit {', '.join(commits)}."


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def count(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def quoted(labels: Sequence[str]) -> str:
    """Labels may hold commas themselves."""
    return ", ".join(f"“{label}”" for label in labels)


def _value(row: Row, metric: str) -> str:
    words, values = measure(metric), row.values(metric)
    return f"{words.scale * float(np.mean(values)):.{words.digits}f} {words.unit}".strip() if values else "unknown"


def _names(labels: Sequence[str]) -> str:
    return f"{len(labels)} ({quoted(labels)})" if labels else "none"
