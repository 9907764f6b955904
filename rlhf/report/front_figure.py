"""The figure of a search: every configuration in the first two objectives, and the front of those not dominated."""

import numpy as np
from matplotlib.figure import Figure

from rlhf.report.courses import Numbers
from rlhf.report.figure_style import GREY, PALETTE, axis_title, canvas, set_title
from rlhf.report.metric_info import metric_info
from rlhf.report.pareto_front import front_of
from rlhf.report.runs import Sweep

NUMBERED = 30  # configurations of the front that get their number; more would cover each other


def draw_front(sweep: Sweep, title: str) -> tuple[Figure, Numbers] | None:
    """The front over all configurations; None for a sweep without two objectives."""
    front = front_of(sweep)
    if front is None or len(front.objectives) < 2:
        return None
    x, y = list(front.objectives)[:2]
    points = front.points[:, :2] * [metric_info(x).scale, metric_info(y).scale]
    figure, (axes,) = canvas(1)
    axes.plot(*points.T, ls="", marker="o", ms=5, mfc="none", mec=GREY, gid="all")
    best = points[front.best]
    line = "" if len(front.objectives) > 2 else "-"  # in more dimensions a line would join what is not adjacent
    axes.plot(*best.T, ls=line, lw=1.1, marker="o", ms=6, color=PALETTE[0], gid="front")
    for number, point in enumerate(best[:NUMBERED], start=1):
        axes.annotate(str(number), point, (5, 5), textcoords="offset points", fontsize=8.5)
    for setter, metric in ((axes.set_xlabel, x), (axes.set_ylabel, y)):
        info, direction = metric_info(metric), front.objectives[metric]
        setter(axis_title(metric) if info.better else f"{info.title}\n({direction})")
    set_title(figure, title)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    order = {i: number for number, i in enumerate(front.best, start=1)}
    return figure, [
        {"row": row.label, **dict(zip((x, y), map(float, point), strict=True)), "front": order.get(i, "")}
        for i, (row, point) in enumerate(zip(front.rows, np.asarray(points), strict=True))
    ]
