"""How each kind of figure draws the course of a row, and the numbers that it draws.

Points are those of `along` or `along_distance`: step or distance → [replicates, 2], x and y in display units.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from rlhf.report.figure_style import Look
from rlhf.report.linear_range import Line, initial_line
from rlhf.report.statistics import Array, replicate_error

Points = dict[float, Array]
Numbers = list[dict[str, Any]]  # the lines of a figure's CSV file


@dataclass(frozen=True)
class Course:
    """The course of a row in one metric.

    Attributes:
        label: the row.
        names: the metrics of x and y.
        points: along it, ascending in steps or distance.
    """

    label: str
    names: tuple[str, str]
    points: Points

    @property
    def means(self) -> Array:
        """[points, 2]: the means over replicates."""
        return np.array([pairs.mean(axis=0) for pairs in self.points.values()])

    @property
    def errors(self) -> Array:
        """[points, 2]: the standard errors of the means; NaN with a single replicate."""
        return np.array([[replicate_error(values) for values in pairs.T] for pairs in self.points.values()])

    @property
    def rooted(self) -> "Course":
        """The same against the square root of x, the true KL; where that is small its estimate can be negative."""
        points = {s: np.stack([np.sqrt(np.maximum(p[:, 0], 0)), p[:, 1]], axis=1) for s, p in self.points.items()}
        return replace(self, points=points)


def draw_curve(axes: Axes, course: Course, look: Look) -> Numbers:
    """The mean of y over replicates against the step or distance, with a band of one standard error."""
    steps, means, errors = list(course.points), course.means[:, 1], course.errors[:, 1]
    band = np.nan_to_num(errors)  # one replicate has no standard error, and no band
    axes.fill_between(steps, means - band, means + band, color=look.color, alpha=0.2, lw=0)
    axes.plot(steps, means, color=look.color, ls=look.line, marker=_marker_for(look, steps), ms=3.5)
    x, y = course.names
    return [
        {"row": course.label, x: step, y: mean, "se": error, "replicates": len(course.points[step])}
        for step, mean, error in zip(steps, means, errors, strict=True)
    ]


def draw_path(axes: Axes, course: Course, look: Look) -> Numbers:
    """The mean of y against the mean of x, joined in the order of the steps, with bars of one standard error."""
    means, errors = course.means, np.nan_to_num(course.errors)
    x_error, y_error = errors.T
    axes.errorbar(means[:, 0], means[:, 1], y_error, x_error, color=look.color, ls=look.line, marker=look.marker,
                  ms=4, lw=1.4, elinewidth=0.9)  # fmt: skip
    x, y = course.names
    return [
        {"row": course.label, "step": step, x: mean[0], y: mean[1], f"{x} se": error[0], f"{y} se": error[1],
         "replicates": len(course.points[step])}
        for step, mean, error in zip(course.points, means, course.errors, strict=True)
    ]  # fmt: skip


def draw_sqrt_kl(axes: Axes, course: Course, look: Look) -> Numbers:
    """y against the square root of x, the true KL, with the straight line that fits its initial range."""
    rooted, means = course.rooted.points, course.rooted.means
    axes.plot(*np.concatenate(list(rooted.values())).T, color=look.color, ls="", marker=look.marker or ".", ms=3,
              alpha=0.35)  # fmt: skip
    axes.plot(*means.T, color=look.color, ls=look.line, lw=1.6)
    # the line starts at the SFT model, so step 0 must have been evaluated
    line = initial_line(list(rooted.values()), float(means[0, 1])) if 0 in course.points else None
    if line:
        _draw_linear_range(axes, line, look)
    fitted = {"linear_to": line.end, "slope": line.slope, "offset": line.offset, "bent": line.bent} if line else {}
    return [
        {"metric": course.names[1], "row": course.label, "step": step, "sqrt_true_kl": x, "value": y,
         "replicates": len(rooted[step])} | fitted
        for step, (x, y) in zip(rooted, means, strict=True)
    ]  # fmt: skip


def _draw_linear_range(axes: Axes, line: Line, look: Look) -> None:
    """A thin dotted line over the initial linear range, with a bar at its end if training went beyond it."""
    end = line.offset + line.slope * line.end
    axes.plot([0, line.end], [line.offset, end], color=look.color, ls=(0, (1, 1.5)), lw=1.4, zorder=3)
    if line.bent:
        axes.plot(line.end, end, color=look.color, marker="|", ms=14, mew=1.6)


def _marker_for(look: Look, steps: Sequence[float]) -> str:
    """The marker of a curve; with more than 25 points they would merge into a thick line."""
    return look.marker if len(steps) <= 25 else ""
