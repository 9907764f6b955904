"""The Pareto front of a search: the configurations that no other one dominates."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf.objectives import objectives_of
from rlhf.report.metric_info import metric_info
from rlhf.report.rows import Row
from rlhf.report.runs import Sweep
from rlhf.report.statistics import Array
from rlhf.report.tables import NOTHING, Cell, Number, Table


@dataclass(frozen=True)
class Front:
    """The rows of a search in its objectives.

    Attributes:
        objectives: metric → direction.
        rows: those that have all objectives.
        points: [rows, objectives], means over replicates.
        best: the positions of the rows that no other dominates, ordered by the first objective, best first.
    """

    objectives: Mapping[str, str]
    rows: list[Row]
    points: Array
    best: list[int]


def front_of(sweep: Sweep) -> Front | None:
    """The front of a sweep; None without `objectives`, or if no row has all of them."""
    objectives = objectives_of(sweep.finished[0].config)
    rows = [row for row in sweep.trained if all(row.values(metric) for metric in objectives)]
    if not objectives or not rows:
        return None
    points = np.array([[np.mean(row.values(metric)) for metric in objectives] for row in rows])
    signs = np.array([1.0 if direction == "maximize" else -1.0 for direction in objectives.values()])
    best = sorted(np.flatnonzero(non_dominated(points * signs)), key=lambda i: -signs[0] * points[i, 0])
    return Front(objectives, rows, points, [int(i) for i in best])


def front_table(sweep: Sweep) -> Table | None:
    """The table of the non-dominated rows, ordered by the first objective, best first.

    With one objective this is the best row. None for a sweep without `objectives`, or if no row has all of them.
    """
    front = front_of(sweep)
    if front is None:
        return None
    objectives, rows, points, best = front.objectives, front.rows, front.points, front.best
    # a line for each: its objectives, its settings on the axes of the search, and a run that has them
    axes = _axes(rows)
    lines: list[Sequence[Cell]] = []
    for i in best:
        settings = settings_of(rows[i])
        values = [_objective_cell(value, metric) for value, metric in zip(points[i], objectives, strict=True)]
        lines.append([*values, *(_setting_cell(settings.get(axis, NOTHING)) for axis in axes), rows[i].runs[0].name])
    header = [*(metric_info(metric).title for metric in objectives), *axes, "run"]
    goals = " and ".join(f"{metric_info(metric).name} ({direction})" for metric, direction in objectives.items())
    caption = (
        f"{len(best)} of {len(rows)} configurations: no other is as good in {goals} and better in one of them."
        " The best of many single runs look better than they are: run them again as other replicates."
    )
    return Table(header, lines, caption)


def non_dominated(points: Array) -> NDArray[np.bool_]:
    """Which points are on the Pareto front: no other is at least as good in all objectives and better in one.

    Args:
        points: [rows, objectives], where more is better.

    Returns:
        [rows], true on the front.
    """
    as_good = (points[:, None] >= points[None]).all(axis=-1)  # [i, j]: row i is at least as good as row j in all
    better = (points[:, None] > points[None]).any(axis=-1)
    return np.asarray(~(as_good & better).any(axis=0))


def _axes(rows: Sequence[Row]) -> list[str]:
    """The keys of the overrides in which the rows differ: the axes of the search."""
    chosen = [settings_of(row) for row in rows]
    keys = dict.fromkeys(key for settings in chosen for key in settings)
    return [key for key in keys if len({settings.get(key) for settings in chosen}) > 1]


def settings_of(row: Row) -> dict[str, str]:
    """Key → value of a row's overrides."""
    return dict(override.partition("=")[::2] for override in row.runs[0].key)


def _objective_cell(value: float, metric: str) -> Number:
    """A value in display units."""
    info = metric_info(metric)
    return Number(info.scale * float(value), digits=info.digits)


def _setting_cell(text: str) -> Cell:
    """An override's value, a non-integer number to three significant figures (CSV keeps all of them)."""
    try:
        value = float(text)
    except ValueError:
        return text
    if text.lstrip("-").isdigit() or not math.isfinite(value):
        return text
    return Number(value, digits=max(0, 2 - math.floor(math.log10(abs(value) or 1))))
