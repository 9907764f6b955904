"""A setting chosen by a rule: the largest of its values at which a metric stays within a limit, or the best one."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf.errors import FigureError
from rlhf.report.metric_info import metric_info
from rlhf.report.pareto_front import settings_of
from rlhf.report.runs import Sweep, label
from rlhf.report.tables import NOTHING, Cell, Number, Table

KEYS = ({"key", "metric", "limit"}, {"key", "metric", "best"})
SIGNS = {"max": 1, "min": -1}


def tuning_table(sweep: Sweep) -> Table | None:
    """One line per group of rows that differ in the rule's key alone, with the value that is chosen there.

    The rule is the layout's `tuning`. With {key, metric, limit} a value is chosen if the metric's mean over replicates
    is at most the limit there and at all smaller values, so that one lucky run beyond the limit decides nothing. With
    {key, metric, best} it is the one whose mean is the best (max or min). None without a rule, or if no row has its
    key.

    Raises:
        FigureError: the rule lacks one of these, or has others.
    """
    rule = sweep.layout.get("tuning")
    if not rule:
        return None
    if set(rule) not in KEYS or rule.get("best", "max") not in SIGNS:
        allowed = " or ".join(", ".join(sorted(keys)) for keys in KEYS)
        raise FigureError(f"report.tuning={dict(rule)}: it must have exactly {allowed} (max or min)")
    found = _values(sweep, str(rule["key"]), str(rule["metric"]))
    if not found:
        return None
    return _best_table(rule, found) if "best" in rule else _limit_table(rule, found)


def _limit_table(rule: Mapping[str, Any], found: Mapping[str, Mapping[str, list[float]]]) -> Table:
    """The largest value within the limit, and the next larger one."""
    key, limit, info = str(rule["key"]), float(rule["limit"]), metric_info(str(rule["metric"]))
    lines: list[Sequence[Cell]] = []
    for name, each in found.items():
        values = {value: float(np.mean(replicates)) for value, replicates in each.items()}
        chosen = _largest_within(values, limit)
        larger = next((value for value in values if chosen is None or float(value) > float(chosen)), None)
        cells: list[Cell] = [name]
        for value in (chosen, larger):
            cells += [value, Number(info.scale * values[value], digits=info.digits)] if value else [NOTHING, NOTHING]
        lines.append(cells)
    caption = (
        f"The largest {key} of this sweep at which {info.name} is at most {info.scale * limit:g}, there and at all"
        " smaller values, and beside it the next larger one, which is too large. –: all are too large, or none is."
    )
    return Table(["row", key, info.title, f"next {key}", f"{info.title} there"], lines, caption)


def _best_table(rule: Mapping[str, Any], found: Mapping[str, Mapping[str, list[float]]]) -> Table:
    """The best value by the mean over replicates, and what choosing it is worth on a replicate that had no say."""
    key, sign, info = str(rule["key"]), SIGNS[rule["best"]], metric_info(str(rule["metric"]))
    lines: list[Sequence[Cell]] = []
    for name, values in found.items():
        tried, chosen = list(values), _best(values, sign)
        honest = _left_out(values, sign)
        there = [info.scale * float(np.mean(values[chosen])), None if honest is None else info.scale * honest]
        cells = [NOTHING if number is None else Number(number, digits=info.digits) for number in there]
        lines.append([name, chosen, *cells, "yes" if len(tried) > 1 and chosen in (tried[0], tried[-1]) else "no"])
    caption = (
        f"The {key} with the best mean {info.name}. That mean flatters, because the replicates that it is taken over"
        " have chosen: beside it, the mean over replicates of what the others' choice gives there. A choice at the edge"
        " of the grid asks for a wider one. –: a single replicate, or values that not all have."
    )
    return Table(["row", key, info.title, f"{info.title}, chosen by the others", "at the edge"], lines, caption)


def _best(values: Mapping[str, Sequence[float]], sign: int) -> str:
    """The value with the best mean; a run that diverged (NaN) is worse than any other."""
    means = {value: sign * float(np.mean(replicates)) for value, replicates in values.items()}
    return max(means, key=lambda value: -np.inf if np.isnan(means[value]) else means[value])


def _left_out(values: Mapping[str, Sequence[float]], sign: int) -> float | None:
    """The mean over replicates of the metric at the value that all other replicates choose; None if there are none."""
    counts = {len(replicates) for replicates in values.values()}
    if len(counts) != 1 or counts == {1}:
        return None
    given = []
    for out in range(counts.pop()):
        others = {value: [x for i, x in enumerate(each) if i != out] for value, each in values.items()}
        given.append(values[_best(others, sign)][out])
    return float(np.mean(given))


def _values(sweep: Sweep, key: str, metric: str) -> dict[str, dict[str, list[float]]]:
    """Label of the rows that differ in `key` alone → value of `key`, ascending → the metric of each replicate."""
    labels: Mapping[str, Any] = sweep.layout.get("labels") or {}
    found: dict[str, dict[str, list[float]]] = {}
    having = [row for row in sweep.trained if key in settings_of(row) and row.values(metric)]
    for row in sorted(having, key=lambda row: float(settings_of(row)[key])):
        rest = [item for item in row.runs[0].key if item.partition("=")[0] != key]
        found.setdefault(label(rest, labels), {})[settings_of(row)[key]] = row.values(metric)
    return found


def _largest_within(values: Mapping[str, float], limit: float) -> str | None:
    """The last of ascending values before the metric first exceeds the limit; None if it does at the first."""
    chosen = None
    for value, mean in values.items():
        if not mean <= limit:  # NaN, the mark of a run that diverged, is beyond every limit
            break
        chosen = value
    return chosen
