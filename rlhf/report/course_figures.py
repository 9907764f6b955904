"""Figures of the courses of rows: in one panel if they are few, else each in a panel of its own before the baseline."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rlhf.report.courses import Course, Numbers, draw_curve, draw_path, draw_sqrt_kl
from rlhf.report.figure_labels import End, label_column, make_room
from rlhf.report.figure_style import (
    BEHIND,
    FAINT,
    Look,
    axis_title,
    canvas,
    grid,
    set_title,
    wide_enough,
)
from rlhf.report.metric_info import metric_info
from rlhf.report.statistics import Array

TOGETHER = 4  # rows whose bands can be told apart in one panel
PANELS = 30  # above this even panels are too many: one panel shows the means, and the interactive view tells them apart
COLUMNS = 4  # of the panels of a figure with one metric
KINDS: dict[str, Callable[[Axes, Course, Look], Numbers]] = {
    "curve": draw_curve, "path": draw_path, "sqrt_kl": draw_sqrt_kl, "distance": draw_curve,
}  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """What a figure of courses shows.

    Attributes:
        title: of the figure.
        kind: one of `KINDS`.
        courses: metric → the courses of the rows that have it, at least one.
        looks: label of every row → its look.
        against: the label of the baseline.
        starts: metric → the mean of the SFT models in display units, for those that have one.
        x_title: of the x axes.
    """

    title: str
    kind: str
    courses: Mapping[str, Sequence[Course]]
    looks: Mapping[str, Look]
    against: str
    starts: Mapping[str, float]
    x_title: str

    @property
    def rows(self) -> list[str]:
        """The labels of the rows, in order."""
        return list(dict.fromkeys(course.label for courses in self.courses.values() for course in courses))


def draw_courses(scene: Scene) -> tuple[Figure, Numbers]:
    """The figure with the numbers of its CSV file, one line per row and point."""
    if len(scene.rows) > PANELS:
        return _crowd(scene)
    return _together(scene) if len(scene.rows) <= TOGETHER else _apart(scene)


def _together(scene: Scene) -> tuple[Figure, Numbers]:
    """One panel per metric, with all rows in each: labels beside lines that end together, else a legend above."""
    figure, panels = canvas(len(scene.courses))
    numbers: Numbers = []
    ends: list[list[End]] = []
    for axes, (metric, courses) in zip(panels, scene.courses.items(), strict=True):
        for course in courses:
            numbers += KINDS[scene.kind](axes, course, scene.looks[course.label])
        _start_line(axes, metric, scene)
        last = [(course.label, *_x_as_drawn(scene, course)[-1].tolist()) for course in courses]
        ends.append([End(x, y, label, scene.looks[label]) for label, x, y in last])
        axes.set_xlabel(scene.x_title)
        axes.set_ylabel(axis_title(metric))
        _limit([axes], metric)
    set_title(figure, scene.title)
    if scene.kind == "curve":
        make_room(figure, ends)
        for axes, labels in zip(panels, ends, strict=True):
            label_column(axes, labels)
        figure.legend(handles=_start_handles(scene), loc="upper right")
    else:
        handles = [_handle(scene.looks[label], label) for label in scene.rows]
        room = _legend(figure, [*handles, *_start_handles(scene)])
        figure.tight_layout(rect=(0, 0, 1, 1 - room / figure.get_figheight()))
    return figure, numbers


def _apart(scene: Scene) -> tuple[Figure, Numbers]:
    """A panel per row and metric, with the baseline in grey behind: a line per row, or panels in lines of `COLUMNS`."""
    metrics, labels = list(scene.courses), scene.rows
    cells = [(metric, label) for label in labels for metric in metrics]
    columns = COLUMNS if len(metrics) == 1 else len(metrics)
    figure, lines = grid(-(-len(cells) // columns), columns, *([1.5] if len(metrics) > 1 else []))
    numbers: Numbers = []
    panels: dict[str, list[Axes]] = {metric: [] for metric in metrics}
    for i, axes in enumerate(axes for line in lines for axes in line):
        if i >= len(cells):
            axes.set_visible(False)
            continue
        metric, label = cells[i]
        numbers += _panel(axes, scene, metric, label)
        panels[metric].append(axes)
        if i + columns >= len(cells):  # nothing below it
            axes.set_xlabel(scene.x_title, fontsize=9)
        if len(metrics) > 1:
            axes.set_ylabel(axis_title(metric) if i < columns else metric_info(metric).title, fontsize=8)
        elif i % columns == 0:
            axes.set_ylabel(axis_title(metric), fontsize=8.5)
    for metric, shown in panels.items():
        _limit(shown, metric)
    _share_x([axes for shown in panels.values() for axes in shown])
    set_title(figure, scene.title)
    behind = [_handle(BEHIND, f"baseline: {scene.against}")] if scene.against in labels else []
    room = _legend(figure, [*behind, *_start_handles(scene)])
    figure.tight_layout(rect=(0, 0, 1, 1 - room / figure.get_figheight()))
    return figure, numbers


def _panel(axes: Axes, scene: Scene, metric: str, label: str) -> Numbers:
    """One row in colour, before the baseline in grey; empty if the row lacks the metric. Returns the row's numbers."""
    found = {course.label: course for course in scene.courses[metric]}
    look, numbers = scene.looks[label], Numbers()
    if scene.against in found and scene.against != label:
        means = _x_as_drawn(scene, found[scene.against])
        axes.plot(*means.T, color=BEHIND.color, lw=1.1, marker=".", ms=3.5, zorder=1.5)
    if label in found:
        numbers = KINDS[scene.kind](axes, found[label], look)
    _start_line(axes, metric, scene)
    characters = 24 if len(scene.courses) == 1 else 32  # that fit beside each other
    axes.set_title(textwrap.fill(label, characters), color=look.ink, fontsize=8.5, fontweight="bold")
    axes.tick_params(labelsize=8)
    return numbers


def _crowd(scene: Scene) -> tuple[Figure, Numbers]:
    """One panel per metric with the mean of every row, for more rows than labels could name."""
    figure, panels = canvas(len(scene.courses))
    numbers: Numbers = []
    for axes, (metric, courses) in zip(panels, scene.courses.items(), strict=True):
        for course in courses:
            look = scene.looks[course.label]
            means = _x_as_drawn(scene, course)
            axes.plot(*means.T, color=look.color, ls=look.line, lw=0.9, alpha=0.7)
            keys = zip(course.points, means.tolist(), strict=True)
            numbers += [{"row": course.label, "at": at, "x": x, metric: y} for at, (x, y) in keys]
        _start_line(axes, metric, scene)
        axes.set_xlabel(scene.x_title)
        axes.set_ylabel(axis_title(metric))
        _limit([axes], metric)
    set_title(figure, scene.title)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    return figure, numbers


def _x_as_drawn(scene: Scene, course: Course) -> Array:
    """[points, 2]: the means as the kind of the figure draws them."""
    if scene.kind == "sqrt_kl":
        return course.rooted.means
    if scene.kind in ("curve", "distance"):
        return np.column_stack([list(course.points), course.means[:, 1]])
    return course.means


def _start_line(axes: Axes, metric: str, scene: Scene) -> None:
    """A dotted line where the SFT models are."""
    if metric in scene.starts:
        axes.axhline(scene.starts[metric], color=FAINT, ls=(0, (1, 2)), lw=1.1, zorder=1.2, gid="SFT")


def _limit(panels: Sequence[Axes], metric: str) -> None:
    """Give panels of one metric the same y axis, wide enough for all that they show."""
    low = min(axes.dataLim.y0 for axes in panels)
    high = max(axes.dataLim.y1 for axes in panels)
    if np.isfinite([low, high]).all():
        for axes in panels:
            axes.set_ylim(*wide_enough(low, high, metric))


def _share_x(panels: Sequence[Axes]) -> None:
    """Give panels the same x axis."""
    low, high = min(axes.get_xlim()[0] for axes in panels), max(axes.get_xlim()[1] for axes in panels)
    for axes in panels:
        axes.set_xlim(low, high)


def _handle(look: Look, label: str) -> Line2D:
    """An entry of the legend."""
    return Line2D([], [], color=look.color, ls=look.line, marker=look.marker, ms=3.5, lw=1.5, label=label)


def _start_handles(scene: Scene) -> list[Line2D]:
    """The legend's entry of the SFT line, if a panel has one."""
    line = Line2D([], [], color=FAINT, ls=(0, (1, 2)), lw=1.1, label="SFT")
    return [line] if scene.starts else []


def _legend(figure: Figure, handles: Sequence[Line2D]) -> float:
    """A legend below the title. Returns the height of both in inches."""
    if not handles:
        return 0.35
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(len(handles), int(figure.get_figwidth() / (0.55 + 0.085 * longest))))
    top = 1 - 0.32 / figure.get_figheight()
    figure.legend(handles=list(handles), ncols=columns, loc="upper left", bbox_to_anchor=(0.0, top))
    return 0.42 + 0.19 * -(-len(handles) // columns)
