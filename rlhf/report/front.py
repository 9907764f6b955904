"""The end of a search: the configurations that no other one beats."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rlhf.objectives import objectives_of
from rlhf.report.measures import measure
from rlhf.report.runs import Row, Sweep
from rlhf.report.statistics import Array
from rlhf.report.tables import NOTHING, Cell, Number, Table


def front_table(sweep: Sweep) -> Table | None:
    """A line for each row that no other equals or betters in all objectives, best in the first one first.

    With one objective that is the best row. None for a sweep without `objectives`.
    """
    objectives = objectives_of(sweep.finished[0].config)
    rows = [row for row in sweep.trained if all(row.values(metric) for metric in objectives)]
    if not objectives or not rows:
        return None
    points = np.array([[np.mean(row.values(metric)) for metric in objectives] for row in rows])
    signs = np.array([1.0 if direction == "maximize" else -1.0 for direction in objectives.values()])
    best = sorted(np.flatnonzero(unbeaten(points * signs)), key=lambda i: -signs[0] * points[i, 0])
    axes = axes_of(rows)
    lines: list[Sequence[Cell]] = []
    for i in best:
        chosen = dict(item.partition("=")[::2] for item in rows[i].runs[0].key)
        reached = [_reached(value, metric) for value, metric in zip(points[i], objectives, strict=True)]
        lines.append([*reached, *(_setting(chosen.get(axis, NOTHING)) for axis in axes), rows[i].runs[0].name])
    header = [*(measure(metric).title for metric in objectives), *axes, "run"]
    wanted = " and ".join(f"{measure(metric).name} ({direction})" for metric, direction in objectives.items())
    caption = (
        f"{len(best)} of {len(rows)} configurations: no other is as good in {wanted} and better in one of them."
        " The best of many single runs look better than they are: run them again with other seeds."
    )
    return Table(header, lines, caption)


def unbeaten(points: Array) -> NDArray[np.bool_]:
    """[rows, objectives], more is better → [rows]: whether no other row is as good in all and better in one."""
    as_good = (points[:, None] >= points[None]).all(axis=-1)  # [i, j]: row i is as good as row j in all
    better = (points[:, None] > points[None]).any(axis=-1)
    return np.asarray(~(as_good & better).any(axis=0))


def axes_of(rows: Sequence[Row]) -> list[str]:
    """The keys of the overrides in which rows differ."""
    chosen = [dict(item.partition("=")[::2] for item in row.runs[0].key) for row in rows]
    keys = dict.fromkeys(key for row in chosen for key in row)
    return [key for key in keys if len({row.get(key) for row in chosen}) > 1]


def _reached(value: float, metric: str) -> Number:
    words = measure(metric)
    return Number(words.scale * float(value), digits=words.digits)


def _setting(text: str) -> Cell:
    """A number to three figures; CSV keeps all of them."""
    try:
        value = float(text)
    except ValueError:
        return text
    if text.lstrip("-").isdigit() or not math.isfinite(value):
        return text
    return Number(value, digits=max(0, 2 - math.floor(math.log10(abs(value) or 1))))
