"""The look of the figures: one colour per row in all of them, and labels at the ends of lines instead of a legend."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported: no display is needed

from matplotlib import colors
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# the colours of Okabe & Ito (2008) without yellow, which is illegible on white
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")
INK, FAINT = "#222222", "#666666"
SETTINGS: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
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
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "rlhf",
    "savefig.dpi": 150,
}
SIZE = (7.0, 4.5)  # of a figure with one panel, in inches


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
