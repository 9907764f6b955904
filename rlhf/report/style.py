"""How the figures look: one colour per row everywhere, labels at the ends of the lines, little else."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import colors
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe & Ito's colours without yellow, which cannot be read on white
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
SIZE = (7.0, 4.5)


@dataclass(frozen=True)
class Look:
    """Colour, line and marker of a row."""

    color: str
    line: str
    marker: str

    @property
    def ink(self) -> tuple[float, float, float]:
        """The colour, darkened until text in it can be read."""
        red, green, blue = colors.to_rgb(self.color)
        light = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        keep = min(1.0, 0.42 / light) if light else 1.0
        return red * keep, green * keep, blue * keep


def looks(labels: Sequence[str]) -> dict[str, Look]:
    """A look per row; the line and the marker change where the colours begin again."""
    found = {}
    for i, label in enumerate(labels):
        turn = i // len(PALETTE) % len(LINES)
        found[label] = Look(PALETTE[i % len(PALETTE)], LINES[turn], MARKERS[turn])
    return found


def canvas(panels: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure with panels side by side."""
    width, height = SIZE
    figure, axes = plt.subplots(1, panels, figsize=(width * (1 + 0.7 * (panels - 1)), height), squeeze=False)
    return figure, list(axes[0])
