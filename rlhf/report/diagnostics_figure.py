"""What PPO logs about itself at every step, as small panels: a line per row."""

import math
import textwrap

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rlhf.report.courses import Numbers
from rlhf.report.figure_style import grid, looks, set_title
from rlhf.report.metric_info import metric_info
from rlhf.report.rows import Row
from rlhf.report.runs import Sweep

# the panels, in order; a method that does not log one has no panel for it
METRICS = (
    "ppo/k1", "ppo/approx_kl", "ppo/entropy", "ppo/clip_fraction", "ppo/explained_variance", "ppo/value_loss",
    "ppo/grad_norm", "ppo/reward", "ppo/reward_spread", "ppo/penalty", "ppo/missing_eos", "ppo/response_tokens",
)  # fmt: skip
COLUMNS = 4
NAMED = 24  # rows in the legend; more would fill the figure
DENSE = 300  # points of a line that are drawn at most


def draw_diagnostics(sweep: Sweep, title: str) -> tuple[Figure, Numbers] | None:
    """A panel per logged metric with the mean over the runs of every row at every step; None if nothing was logged."""
    means = {metric: {row.label: _means(row, metric) for row in sweep.trained} for metric in METRICS}
    lines = {metric: {label: line for label, line in rows.items() if line} for metric, rows in means.items()}
    found = {metric: rows for metric, rows in lines.items() if rows}
    if not found:
        return None
    style = looks([row.label for row in sweep.trained])
    columns = min(COLUMNS, len(found))
    figure, panels = grid(-(-len(found) // columns), columns)
    places = [axes for line in panels for axes in line]
    numbers: Numbers = []
    for axes, (metric, rows) in zip(places, found.items(), strict=False):
        for label, line in rows.items():
            look, every = style[label], max(1, len(line) // DENSE)
            axes.plot(list(line)[::every], list(line.values())[::every], color=look.color, ls=look.line, lw=1.1)
            numbers += [{"metric": metric, "row": label, "step": step, "mean": mean} for step, mean in line.items()]
        axes.set_title(textwrap.fill(metric_info(metric).title, 28), fontsize=9)
        axes.tick_params(labelsize=8)
    for axes in places[len(found) :]:
        axes.set_visible(False)
    named = [row.label for row in sweep.trained][:NAMED]
    handles = [Line2D([], [], color=style[label].color, ls=style[label].line, label=label) for label in named]
    set_title(figure, title)
    height = 0.2 * -(-len(handles) // 3) + 0.5
    figure.set_figheight(figure.get_figheight() + height - 0.9)
    figure.tight_layout(rect=(0, 0, 1, 1 - height / figure.get_figheight()))
    figure.legend(handles=handles, ncols=3, loc="upper left", bbox_to_anchor=(0, 1 - 0.3 / figure.get_figheight()))
    return figure, numbers


def _means(row: Row, metric: str) -> dict[int, float]:
    """Step → the mean of the finite values of a row's runs, in display units."""
    found: dict[int, list[float]] = {}
    for run in row.runs:
        for step, values in run.metrics.items():
            value = values.get(metric)
            if isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(step, []).append(float(value))
    scale = metric_info(metric).scale
    return {step: scale * float(np.mean(found[step])) for step in sorted(found)}
