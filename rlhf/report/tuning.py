"""A setting chosen by a rule: the largest of its values in a sweep at which a metric stays within a limit."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf.errors import FigureError
from rlhf.report.metric_info import metric_info
from rlhf.report.pareto_front import settings_of
from rlhf.report.runs import Sweep, label
from rlhf.report.tables import NOTHING, Cell, Number, Table

KEYS = {"key", "metric", "limit"}


def tuning_table(sweep: Sweep) -> Table | None:
    """One line per group of rows that differ in the rule's key alone: the chosen value and the next larger one.

    The rule is the layout's `tuning`: {key, metric, limit}. A value is chosen if the metric's mean over replicates is
    at most the limit there and at all smaller values, so that one lucky run beyond the limit decides nothing. None
    without a rule, or if no row has its key.

    Raises:
        FigureError: the rule lacks one of these, or has others.
    """
    rule = sweep.layout.get("tuning")
    if not rule:
        return None
    if set(rule) != KEYS:
        raise FigureError(f"report.tuning={dict(rule)}: it must have exactly {', '.join(sorted(KEYS))}")
    key, metric, limit = str(rule["key"]), str(rule["metric"]), float(rule["limit"])
    info = metric_info(metric)
    lines: list[Sequence[Cell]] = []
    for name, values in _values(sweep, key, metric).items():
        chosen = _largest_within(values, limit)
        larger = next((value for value in values if chosen is None or float(value) > float(chosen)), None)
        cells: list[Cell] = [name]
        for value in (chosen, larger):
            cells += [value, Number(info.scale * values[value], digits=info.digits)] if value else [NOTHING, NOTHING]
        lines.append(cells)
    if not lines:
        return None
    caption = (
        f"The largest {key} of this sweep at which {info.name} is at most {info.scale * limit:g}, there and at all"
        " smaller values, and beside it the next larger one, which is too large. –: all are too large, or none is."
    )
    return Table(["row", key, info.title, f"next {key}", f"{info.title} there"], lines, caption)


def _values(sweep: Sweep, key: str, metric: str) -> dict[str, dict[str, float]]:
    """Label of the rows that differ in `key` alone → value of `key`, ascending → mean of the metric."""
    labels: Mapping[str, Any] = sweep.layout.get("labels") or {}
    found: dict[str, dict[str, float]] = {}
    having = [row for row in sweep.trained if key in settings_of(row) and row.values(metric)]
    for row in sorted(having, key=lambda row: float(settings_of(row)[key])):
        rest = [item for item in row.runs[0].key if item.partition("=")[0] != key]
        found.setdefault(label(rest, labels), {})[settings_of(row)[key]] = float(np.mean(row.values(metric)))
    return found


def _largest_within(values: Mapping[str, float], limit: float) -> str | None:
    """The last of ascending values before the metric first exceeds the limit; None if it does at the first."""
    chosen = None
    for value, mean in values.items():
        if not mean <= limit:  # NaN, the mark of a run that diverged, is beyond every limit
            break
        chosen = value
    return chosen
