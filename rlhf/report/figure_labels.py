"""Places labels in a column at the ends of lines so that they do not overlap each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf.report.figure_style import Look

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
        _write(axes, end, right, shift, leader=abs(shift) > 4)


def _write(axes: Axes, end: End, right: float, up: float, leader: bool) -> None:
    """Write a label, `right` and `up` points from its line's end, perhaps joined to it by a leader line."""
    where: Any = {"xy": (end.x, end.y), "xytext": (right, up), "textcoords": "offset points", "annotation_clip": False}
    if leader:
        line = {"arrowstyle": "-", "color": end.look.color, "lw": 0.8, "alpha": 0.7, "shrinkA": 0, "shrinkB": 2}
        axes.annotate("", **where, arrowprops=line, zorder=4)
    axes.annotate(
        end.text, **where, ha="left", va="center", fontsize=SIZE, color=end.look.ink, path_effects=HALO, zorder=5
    )


def _extent(axes: Axes, text: str) -> tuple[float, float]:
    """Width and height in pixels of a label."""
    probe = axes.text(0, 0, text, fontsize=SIZE, transform=axes.transAxes)
    box = probe.get_window_extent()
    probe.remove()
    return box.width, box.height


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
