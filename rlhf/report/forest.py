"""Forest plots: the means of all rows with their intervals, and their differences from the baseline."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf.objectives import objectives_of
from rlhf.report.column_differences import column_differences
from rlhf.report.comparisons import compared_metrics, mean_over, origins
from rlhf.report.courses import Numbers
from rlhf.report.equal_distance import METRICS
from rlhf.report.figure_style import BETTER, FAINT, GREY, PAPER, Look, looks, set_title, wide_enough
from rlhf.report.metric_info import metric_info
from rlhf.report.rows import Row
from rlhf.report.runs import Sweep
from rlhf.report.statistics import Estimate

LINE = 0.27  # the height of a row in inches
COLUMNS = 3  # of panels
ROWS = 40  # a search has more: it has a front instead


@dataclass(frozen=True)
class Interval:
    """A row's line in a panel, in display units; `filled` marks what is significant."""

    mean: float
    low: float
    high: float
    filled: bool = True

    @classmethod
    def of(cls, estimate: Estimate, scale: float, filled: bool = True) -> "Interval":
        """An estimate in display units."""
        return cls(scale * estimate.mean, scale * estimate.low, scale * estimate.high, filled)


Panel = Mapping[str, Interval]  # label → its line


def draw_results(sweep: Sweep, title: str) -> tuple[Figure, Numbers] | None:
    """The mean of every row with its 95 % interval, in the metrics that have a value per instruction."""
    panels: dict[str, Panel] = {}
    for metric in dict.fromkeys((*compared_metrics(sweep), *METRICS)):
        means = {row.label: mean_over(row, metric) for row in sweep.rows}
        scale = metric_info(metric).scale
        found = {label: Interval.of(mean, scale) for label, mean in means.items() if mean and np.isfinite(mean.mean)}
        if found:
            panels[metric] = found
    if not panels or _is_search(sweep):
        return None
    titles = {metric: _titled(metric_info(metric).title, metric) for metric in panels}
    start = sweep.rows[0].label
    marks = {metric: panel[start].mean for metric, panel in panels.items() if start in panel}
    return _forest(title, sweep, panels, titles, marks)


def draw_gains(sweep: Sweep, title: str) -> tuple[Figure, Numbers] | None:
    """Each row minus SFT with its 95 % interval, in every column of the main table."""
    return _differences(sweep, origins(sweep)[0], title)


def draw_differences(sweep: Sweep, title: str) -> tuple[Figure, Numbers] | None:
    """The same for the baseline; None if the layout names none."""
    named = origins(sweep)[1:]
    return _differences(sweep, named[0], title.replace("the baseline", f"“{named[0].label}”")) if named else None


def _differences(sweep: Sweep, against: Row, title: str) -> tuple[Figure, Numbers] | None:
    """Each row minus another with its 95 % interval, in every column of the main table."""
    if _is_search(sweep):
        return None
    panels: dict[str, dict[str, Interval]] = {}
    for item in column_differences(sweep, against):
        scale = metric_info(item.metric).scale
        if np.isfinite([item.difference.mean, item.difference.low]).all():
            panels.setdefault(item.metric, {})[item.row.label] = Interval.of(item.difference, scale, item.stands)
    if not panels:
        return None
    titles = {}
    for metric in panels:
        info = metric_info(metric)
        titles[metric] = _titled(f"{info.name} ({info.points})" if info.points else info.name, metric)
    return _forest(title, sweep, panels, titles, dict.fromkeys(panels, 0.0))


def _is_search(sweep: Sweep) -> bool:
    """Whether a sweep is a search, or else has too many rows to compare."""
    return bool(objectives_of(sweep.finished[0].config)) or len(sweep.rows) > ROWS


def _titled(text: str, metric: str) -> str:
    """The title of a panel: a metric, and which direction is better if one is."""
    better = metric_info(metric).better
    return f"{text}\n{BETTER[better]} →" if better == "↑" else (f"{text}\n← {BETTER[better]}" if better else text)


def _forest(
    title: str, sweep: Sweep, panels: Mapping[str, Panel], titles: Mapping[str, str], marks: Mapping[str, float]
) -> tuple[Figure, Numbers]:
    """A panel per metric with a line per row, ordered as in the table; `marks` are the dotted verticals."""
    labels = [row.label for row in sweep.rows if any(row.label in panel for panel in panels.values())]
    style = {sweep.rows[0].label: Look(GREY, "-", "o")} | looks([row.label for row in sweep.trained])
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    names = [textwrap.fill(label, 32, max_lines=4, placeholder=" …") for label in labels]
    height = LINE * max(len(names), 0.6 * sum(name.count("\n") + 1 for name in names))  # long labels need their lines
    size = (2.3 + 2.4 * columns, lines * (height + 0.9) + 0.5)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, sharey=True)
    numbers: Numbers = []
    for place, (metric, panel) in zip(axes.flat, panels.items(), strict=False):
        numbers += _draw_panel(place, metric, panel, labels, style)
        place.set_xlabel(titles[metric], fontsize=8.5)
        shown = [end for line in panel.values() for end in (line.low, line.high)]
        if metric in marks:
            place.axvline(marks[metric], color=FAINT, ls=(0, (1, 2)), lw=1.1, zorder=1)
            shown.append(marks[metric])
        if np.isfinite(shown).all():
            place.set_xlim(*wide_enough(min(shown), max(shown), metric))
    for unused in axes.flat[len(panels) :]:
        unused.set_visible(False)
    axes[0, 0].set_yticks(range(len(labels)), names, fontsize=8.5)
    axes[0, 0].set_ylim(len(labels) - 0.4, -0.6)
    set_title(figure, title)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / size[1]))
    return figure, numbers


def _draw_panel(axes: Axes, metric: str, panel: Panel, labels: Sequence[str], style: Mapping[str, Look]) -> Numbers:
    """The lines of one metric, with the numbers of the CSV file."""
    numbers: Numbers = []
    for height, label in enumerate(labels):
        if label not in panel:
            continue
        line, color = panel[label], style[label].color
        axes.plot([line.low, line.high], [height, height], color=color, lw=1.6, solid_capstyle="butt")
        face = color if line.filled else PAPER
        axes.plot(line.mean, height, marker="o", ms=5.5, mfc=face, mec=color, mew=1.4, ls="", gid=label)
        numbers.append({"metric": metric, "row": label, "mean": line.mean, "low": line.low, "high": line.high,
                        "significant": line.filled})  # fmt: skip
    axes.tick_params(labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    return numbers
