"""The look of the figures: one colour per row in all of them, fair axes, and a dark variant in the SVG."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported: no display is needed

from matplotlib import colors
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf.report.metric_info import metric_info

# the colours of Okabe & Ito (2008) without yellow, which is illegible on white; pure black would be left out of SVG
PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#101010",
)
LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")
INK, FAINT, GREY, GRID, PAPER = "#222222", "#666666", "#9AA0A6", "#E6E6E6", "#FFFFFF"
# the colours of a dark page; the others are legible on both
DARK = {INK: "#E5E7E9", FAINT: "#A3AAB0", GREY: "#7C838A", GRID: "#2F3438", PAPER: "#16181A",
        "#101010": "#D0D4D8", "#0072B2": "#4AA8E0"}  # fmt: skip
# an axis shows at least this much of a metric in display units, so that noise does not fill it
SPANS = {"%": 10.0, "nats per token": 0.02, "tokens": 4.0, "": 0.2}
BETTER = {"↑": "higher is better", "↓": "lower is better"}
SETTINGS: Any = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",  # text stays text: smaller files, and it can be searched
    "svg.hashsalt": "rlhf",
    "savefig.dpi": 150,
}
SIZE = (7.0, 4.5)  # of a figure with one panel, in inches
WIDTH = 9.8  # of a figure of many panels, in inches
HEIGHT = 1.95  # of each of them


@dataclass(frozen=True)
class Look:
    """Colour, line style and marker of a row."""

    color: str
    line: str
    marker: str

    @property
    def ink(self) -> tuple[float, float, float]:
        """The colour as RGB from 0 to 1, darkened until text in it is legible on white."""
        red, green, blue = colors.to_rgb(self.color)
        luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        scale = min(1.0, 0.42 / luminance) if luminance else 1.0
        return red * scale, green * scale, blue * scale


BEHIND = Look(GREY, "-", "")  # of the row that the others are compared with, where it is not the subject


def looks(labels: Sequence[str]) -> dict[str, Look]:
    """Label → look. Line style and marker change each time the colours start again."""
    found = {}
    for i, label in enumerate(labels):
        cycle = i // len(PALETTE) % len(LINES)
        found[label] = Look(PALETTE[i % len(PALETTE)], LINES[cycle], MARKERS[cycle])
    return found


def canvas(panels: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure and its panels, side by side."""
    width, height = SIZE
    figure, axes = plt.subplots(1, panels, figsize=(width * (1 + 0.7 * (panels - 1)), height), squeeze=False)
    return figure, list(axes[0])


def grid(lines: int, columns: int, height: float = HEIGHT) -> tuple[Figure, list[list[Axes]]]:
    """An empty figure of many small panels in lines and columns, with room for a title and a legend above them."""
    width = min(3.2, WIDTH / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(width * columns, height * lines + 0.9), squeeze=False)
    return figure, [list(line) for line in axes]


def set_title(figure: Figure, title: str) -> None:
    """Write the title of a figure at the top left."""
    top = 1 - 0.08 / figure.get_figheight()
    heading = figure.suptitle(title, x=0.01, y=top, ha="left", va="top", fontsize=12, fontweight="bold")
    heading.set_in_layout(False)  # whoever lays out the panels leaves room for it


def axis_title(metric: str) -> str:
    """The name and unit of a metric, and which direction is better if one is."""
    info = metric_info(metric)
    return f"{info.title}\n{BETTER[info.better]} {info.better}" if info.better else info.title


def wide_enough(low: float, high: float, metric: str) -> tuple[float, float]:
    """The limits of an axis that shows `low` to `high` (display units) with a margin, and at least the metric's span.

    A percentage keeps to 0–100 where all its values do.
    """
    info = metric_info(metric)
    least = SPANS.get(info.unit, 0.0)
    middle, span = (low + high) / 2, max(1.1 * (high - low), least, 1e-9)
    start, end = middle - span / 2, middle + span / 2
    if info.unit == "%" and low >= 0 and high <= 100:
        shift = max(0.0, -2 - start) - max(0.0, end - 102)
        start, end = max(start + shift, -2), min(end + shift, 102)
    return start, end


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write a figure as PNG and SVG and close it; the SVG follows the reader's choice of a dark page."""
    figure.savefig(folder / f"{name}.png")
    path = folder / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    path.write_text(with_dark_variant(path.read_text(encoding="utf-8")), encoding="utf-8")


def with_dark_variant(svg: str) -> str:
    """Add the colours of a dark page to an SVG, for readers who prefer one; nothing else changes.

    The rules override the inline styles that Matplotlib writes, so that programs without such queries see the original.
    """
    # text is darkened for a white page, which a dark one must not have
    inks = {colors.to_hex(Look(color, "", "").ink): DARK.get(color, color) for color in PALETTE}
    rules = [
        f'[style*="{kind}: {light.lower()}"] {{ {kind}: {dark.lower()} !important }}'
        for light, dark in (inks | DARK).items()
        for kind in ("fill", "stroke")
    ]
    # text whose style names no colour is black
    rules.append(f'text:not([style*="fill"]) {{ fill: {DARK[INK].lower()} }}')
    style = f"<style>@media (prefers-color-scheme: dark) {{ {' '.join(rules)} }}</style>"
    head, opened, rest = svg.partition("<defs>")
    return f"{head}{style}\n {opened}{rest}"
