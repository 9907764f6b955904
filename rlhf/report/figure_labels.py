"""Places labels at the ends of lines so that they overlap neither each other nor, if possible, the lines."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from rlhf.report.figure_style import Look
from rlhf.report.statistics import Array

SIZE = 8.5
NEAR = 8.0  # distance from the end of a line to its label, in points; a label further away gets a leader line
HALO = [patheffects.withStroke(linewidth=2.5, foreground="white")]


@dataclass(frozen=True)
class End:
    """The end of a line in data coordinates, its label, and the look of both."""

    x: float
    y: float
    text: str
    look: Look


def make_room(figure: Figure, ends: Sequence[Sequence[End]]) -> None:
    """Resize the panels to the largest width that leaves room for the labels inside the figure.

    Args:
        figure: its axes are side by side.
        ends: the labels of each panel.
    """
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    width, panels = figure.bbox.width, figure.axes
    cell, left = width / len(panels), panels[0].bbox.x0
    room = panels[0].bbox.width if len(panels) == 1 else cell - left - 8
    for axes, labels in zip(panels, ends, strict=True):
        for end in labels:
            # pixels to the right of the end of the line; `reach` is where that end is, as a share of the panel's width
            needed = _extent(axes, end.text)[0] + 20 * figure.dpi / 72
            reach = axes.transAxes.inverted().transform(axes.transData.transform((end.x, end.y)))[0]
            room = min(room, (cell - left - needed) / max(reach, 0.05))
    room = max(room, 0.4 * cell)  # rather cut off a very long label than shrink the panel further
    right = left + cell * (len(panels) - 1) + room
    figure.subplots_adjust(left=left / width, right=right / width, wspace=(cell - room) / room)


def label_column(axes: Axes, ends: Sequence[End]) -> None:
    """Write labels in a column to the right of lines that end at the same x, in the order of the lines, moved apart."""
    if not ends:
        return
    places = [float(axes.transData.transform((end.x, end.y))[1]) for end in ends]
    height = 1.05 * _extent(axes, "X")[1]
    moved = _apart(places, height, min(axes.bbox.y0, *places), max(axes.bbox.y1, *places))
    shifts = [float(target - place) * 72 / axes.figure.dpi for place, target in zip(places, moved, strict=True)]
    right = NEAR + 6 if any(abs(shift) > 1 for shift in shifts) else NEAR
    for end, shift in zip(ends, shifts, strict=True):
        _write(axes, end, right, shift, "left", leader=abs(shift) > 4)


def label_points(axes: Axes, ends: Sequence[End]) -> None:
    """Write labels around points anywhere in the panel: each gets the candidate position that covers least.

    The candidates are 16 directions at five distances. Labels are placed one after another.
    """
    lines, taken = _sampled(axes), list[Bbox]()
    scale = axes.figure.dpi / 72
    around = [
        (radius * math.cos(angle), radius * math.sin(angle))
        for radius in (NEAR, 18, 30, 44, 60)
        for angle in np.linspace(0, 2 * math.pi, 16, endpoint=False)
    ]
    # the rightmost first, as they have the fewest positions to choose from
    for end in sorted(ends, key=lambda end: -end.x):
        x, y = axes.transData.transform((end.x, end.y))
        width, height = _extent(axes, end.text)

        # what a label at an offset covers: points of lines (1 each), other labels (200 each); outside the panel: 1000
        def cost(offset: tuple[float, float], x: float = x, y: float = y, w: float = width, h: float = height) -> float:
            box = _box(x + scale * offset[0], y + scale * offset[1], w, h, _side(offset[0]))
            covered = ((lines > box.min) & (lines < box.max)).all(axis=1).sum()
            outside = not (axes.bbox.y0 < box.y0 and box.y1 < axes.bbox.y1 + h and axes.bbox.x0 < box.x0)
            outside = outside or box.x1 > axes.figure.bbox.x1
            far = 0.3 * math.hypot(*offset) - 0.1 * offset[0]
            return float(covered + 200 * box.count_overlaps(taken) + 1000 * outside + far)

        right, up = min(around, key=cost)
        taken.append(_box(x + scale * right, y + scale * up, width, height, _side(right)))
        _write(axes, end, right, up, _side(right), leader=math.hypot(right, up) > NEAR + 1)


def _write(axes: Axes, end: End, right: float, up: float, side: str, leader: bool) -> None:
    """Write a label, `right` and `up` points from its line's end, perhaps joined to it by a leader line."""
    where: Any = {"xy": (end.x, end.y), "xytext": (right, up), "textcoords": "offset points", "annotation_clip": False}
    if leader:
        line = {"arrowstyle": "-", "color": end.look.color, "lw": 0.8, "alpha": 0.7, "shrinkA": 0, "shrinkB": 2}
        axes.annotate("", **where, arrowprops=line, zorder=4)
    axes.annotate(
        end.text, **where, ha=side, va="center", fontsize=SIZE, color=end.look.ink, path_effects=HALO, zorder=5
    )


def _side(right: float) -> str:
    """The horizontal alignment of a label that is `right` points to the right of its line's end."""
    return "center" if abs(right) < 3 else ("left" if right > 0 else "right")


def _box(x: float, y: float, width: float, height: float, side: str) -> Bbox:
    """The area in pixels of a label at (x, y)."""
    left = x - width * {"left": 0.0, "center": 0.5, "right": 1.0}[side]
    return Bbox.from_bounds(left, y - height / 2, width, height)


def _extent(axes: Axes, text: str) -> tuple[float, float]:
    """Width and height in pixels of a label."""
    probe = axes.text(0, 0, text, fontsize=SIZE, transform=axes.transAxes)
    box = probe.get_window_extent()
    probe.remove()
    return box.width, box.height


def _sampled(axes: Axes) -> Array:
    """[points, 2]: pixel coordinates along all lines of a panel, about four pixels apart."""
    found = [np.zeros((0, 2))]
    for line in axes.lines:
        corners = axes.transData.transform(np.column_stack([line.get_xdata(), line.get_ydata()]).astype(float))
        found.append(corners)
        if line.get_linestyle() != "None":
            found += [np.linspace(a, b, max(2, int(np.hypot(*(b - a)) / 4))) for a, b in pairwise(corners)]
    return np.concatenate(found)


def _apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move heights apart until neighbours differ by at least `gap`, keeping their order and, if possible, their range.

    Overlapping neighbours are pushed apart evenly, again and again, until nothing moves (at most 500 times).
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    places = [wanted[i] for i in order]
    for _ in range(500):
        before = list(places)
        for i in range(len(places) - 1):
            lack = gap - (places[i + 1] - places[i])
            if lack > 1e-6:
                places[i] -= lack / 2
                places[i + 1] += lack / 2
        places = [float(min(max(place, low), high)) for place in places]
        if places == before:
            break
    return [places[order.index(i)] for i in range(len(wanted))]
