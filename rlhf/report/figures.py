"""The figures of a report, each as PNG and SVG with its numbers as CSV.

The configuration lists them under `report.figures`, each as `{name, title, kind, x, y, rows}`. The kinds are:

- `curve`: a metric against the PPO step;
- `path`: one metric against another along training;
- `sqrt_kl`: metrics against the square root of the true KL, with the initial linear range;
- `distance`: the same at equal distances instead of equal steps, as means over replicates where all of them got to;
- `pull`, with only a name and a title: the restoring pull of each estimator. It needs no runs.
"""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf.errors import FigureError
from rlhf.report.equal_distance import KL, along_distance
from rlhf.report.figure_labels import End, label_column, label_points, make_room
from rlhf.report.figure_style import SETTINGS, Look, canvas, looks
from rlhf.report.linear_range import Line, initial_line
from rlhf.report.metric_info import metric_info
from rlhf.report.rows import Row
from rlhf.report.runs import Sweep
from rlhf.report.statistics import Array, replicate_error

ROOTED = ("sqrt_kl", "distance")  # the kinds with the square root of the true KL on the x axis
# for a layout without `figures`
DEFAULT: list[dict[str, Any]] = [
    {"name": "win_rate", "title": "Win rate during PPO", "kind": "curve", "y": "eval/win_rate"},
    {"name": "true_kl", "title": "Distance from SFT during PPO", "kind": "curve", "y": KL},
    {"name": "response_tokens", "title": "Response length during PPO", "kind": "curve", "y": "eval/response_tokens"},
    {"name": "win_rate_by_kl", "title": "Win rate against distance from SFT", "kind": "path", "x": KL,
     "y": "eval/win_rate"},
]  # fmt: skip
Numbers = list[dict[str, Any]]  # the lines of a figure's CSV file
Drawn = tuple[Numbers, End]  # what a row adds to a panel: its numbers, and the end of its line
# what the page says below a figure, by kind
NOTES = {
    "pull": "By enumeration on a toy policy, not from these runs: the share of the KL's gradient that an estimator has"
    " when it is used as a reward. 1: all of it; 0: it does not pull.",
    "curve": "Mean over replicates; the band is ± one standard error (the table says what replicates are, and how often"
    " that covers the true mean).",
    "distance": "Mean over replicates ± one standard error when √KL first gets to a value, interpolated between"
    " evaluations, as far as all replicates went.",
    "path": "Evaluations during training, joined in order, as means over replicates. Paths start at the SFT model.",
    "sqrt_kl": "Points: every evaluation of every replicate; lines: their means. The broad stroke is a straight line"
    " from the SFT model, fitted to the longest initial range that does not bend (absent if it bends within the first"
    " three evaluations). A bar marks its end if training went beyond it.",
}


def make_figures(sweep: Sweep, folder: Path) -> list[dict[str, str]]:
    """Draw the figures of the layout, or the default ones, into `folder`.

    Returns:
        {name, title, note} of every figure; those for which no run has data are left out.

    Raises:
        FigureError: a figure lacks a key or is of no known kind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for spec in figure_specs(sweep.layout):
        with plt.rc_context(SETTINGS):
            drawn = draw_pull(spec) if spec.get("kind") == "pull" else _draw(sweep, spec)
            if drawn is None:
                continue
            figure, numbers, note = drawn
            name = str(spec["name"])
            figure.savefig(folder / f"{name}.png")
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)
        write_numbers(folder / f"{name}.csv", numbers)
        made.append({"name": name, "title": str(spec.get("title", name)), "note": note})
    return made


def write_numbers(path: Path, numbers: Numbers) -> None:
    """Write the numbers of a figure as CSV; keys that a line lacks are left empty."""
    header = list(dict.fromkeys(key for line in numbers for key in line))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, header, lineterminator="\n")
        writer.writeheader()
        writer.writerows(numbers)


def _draw(sweep: Sweep, spec: Mapping[str, Any]) -> tuple[Figure, Numbers, str] | None:
    """A figure of the sweep's rows with its numbers and its note, or None if no row has data for it."""
    # 1. Which rows and metrics.
    kind = spec.get("kind")
    if kind not in KINDS or "name" not in spec or "y" not in spec:
        allowed = ", ".join([*KINDS, "pull"])
        raise FigureError(f"report.figures: {dict(spec)} needs name, y and a kind; allowed: {allowed}")
    chosen = spec.get("rows")
    rows = [row for row in sweep.trained if not chosen or any(row.is_called(name) for name in chosen)]
    x = x_metric(spec)
    ys = [y for y in y_metrics(spec) if any(along(row, x, y) for row in rows)]
    if not ys:
        return None
    # 2. A panel per metric. Looks depend on all rows, so that a row has the same colour in every figure.
    style = looks([row.label for row in sweep.trained])
    figure, panels = canvas(len(ys))
    numbers: Numbers = []
    labels: list[list[End]] = []
    for axes, y in zip(panels, ys, strict=True):
        labels.append([])
        for row in rows:
            points = along_distance(row, y) if kind == "distance" else along(row, x, y)
            if points:
                names = ("sqrt_true_kl" if kind == "distance" else x, y)
                lines, end = KINDS[kind](axes, row, style[row.label], points, names)
                numbers += lines
                labels[-1].append(end)
        axes.set_ylabel(metric_info(y).title)
        axes.set_xlabel("√ true KL (√nats per token)" if kind in ROOTED else metric_info(x).title)
    _set_title(figure, spec)
    # 3. Labels, once the panels have their final size.
    make_room(figure, labels)
    for axes, ends in zip(panels, labels, strict=True):
        (label_column if kind == "curve" else label_points)(axes, ends)
    return figure, numbers, NOTES[kind]


def draw_pull(spec: Mapping[str, Any]) -> tuple[Figure, Numbers, str]:
    """The restoring pull of each estimator used as a reward, relative to the KL's gradient, against the KL.

    Raises:
        FigureError: the figure has no name.
    """
    from rlhf.restoring_pull import DISTANCES, pulls  # imports torch, which the other figures do not need

    if "name" not in spec:
        raise FigureError(f"report.figures: {dict(spec)} needs a name")
    found = pulls()
    style = looks(list(found))
    figure, (axes,) = canvas(1)
    for name, numbers in found.items():
        look = style[name]
        axes.plot(DISTANCES, numbers, color=look.color, ls=look.line, marker=look.marker, ms=3.5)
    axes.set_xscale("log")
    axes.set_xlabel("KL from the reference (nats per token)")
    axes.set_ylabel("pull relative to the KL's gradient")
    _set_title(figure, spec)
    ends = [End(DISTANCES[-1], numbers[-1], name, style[name]) for name, numbers in found.items()]
    make_room(figure, [ends])
    label_column(axes, ends)
    lines = [
        {"estimator": name, "kl": distance, "pull": pull}
        for name, numbers in found.items()
        for distance, pull in zip(DISTANCES, numbers, strict=True)
    ]
    return figure, lines, NOTES["pull"]


def figure_specs(layout: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The figures that a layout lists, or `DEFAULT` if it does not say; an empty list means no figures."""
    specs = layout.get("figures")
    return list(DEFAULT if specs is None else specs)


def x_metric(spec: Mapping[str, Any]) -> str:
    """The metric on the x axis of a figure: given by its kind, or else its `x`, the true KL by default."""
    return {"curve": "step", **dict.fromkeys(ROOTED, KL)}.get(str(spec["kind"]), str(spec.get("x", KL)))


def y_metrics(spec: Mapping[str, Any]) -> list[str]:
    """The metrics on the y axes of a figure, one per panel."""
    return [spec["y"]] if isinstance(spec["y"], str) else list(spec["y"])


def _set_title(figure: Figure, spec: Mapping[str, Any]) -> None:
    """Write the figure's title, or else its name, at the top left."""
    title = str(spec.get("title", spec["name"]))
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")


def along(row: Row, x: str, y: str) -> dict[int, Array]:
    """Step → [replicates, 2]: x and y in display units, means over the runs of a replicate that have both."""
    found: dict[int, list[Array]] = {}
    for runs in row.replicates.values():
        pairs: dict[int, list[tuple[float, float]]] = {}
        for run in runs:
            for step, values in run.metrics.items():
                pair = (values.get(x), values.get(y))
                # a run that diverged logs NaN; the page has a warning about it
                if all(isinstance(value, int | float) and math.isfinite(value) for value in pair):
                    pairs.setdefault(step, []).append(pair)  # type: ignore[arg-type]
        for step, values_of_runs in pairs.items():
            found.setdefault(step, []).append(np.mean(values_of_runs, axis=0))
    scales = [metric_info(x).scale, metric_info(y).scale]
    return {step: np.stack(found[step]) * scales for step in sorted(found)}


def _draw_curve(axes: Axes, row: Row, look: Look, points: dict[int, Array], names: tuple[str, str]) -> Drawn:
    """The mean of y over replicates against the step or distance, with a band of one standard error.

    `points` are those of `along` or `along_distance`; `names` are the metrics of x and y.
    """
    steps, means = list(points), np.array([pairs[:, 1].mean() for pairs in points.values()])
    errors = np.array([replicate_error(pairs[:, 1]) for pairs in points.values()])
    band = np.nan_to_num(errors)  # one replicate has no standard error, and no band
    axes.fill_between(steps, means - band, means + band, color=look.color, alpha=0.13, lw=0)
    axes.plot(steps, means, color=look.color, ls=look.line, marker=_marker_for(look, steps), ms=3.5)
    numbers = [
        {"row": row.label, names[0]: step, names[1]: mean, "se": error, "replicates": len(points[step])}
        for step, mean, error in zip(steps, means, errors, strict=True)
    ]
    return numbers, End(steps[-1], float(means[-1]), row.label, look)


def _draw_path(axes: Axes, row: Row, look: Look, points: dict[int, Array], names: tuple[str, str]) -> Drawn:
    """The mean of y against the mean of x, joined in the order of the steps; arguments as for `_draw_curve`."""
    means = np.array([pairs.mean(axis=0) for pairs in points.values()])
    axes.plot(*means.T, color=look.color, ls=look.line, marker=look.marker, ms=4, lw=1.4)
    numbers = [
        {"row": row.label, "step": step, names[0]: x, names[1]: y, f"{names[0]} se": replicate_error(pairs[:, 0]),
         f"{names[1]} se": replicate_error(pairs[:, 1]), "replicates": len(pairs)}
        for (step, pairs), (x, y) in zip(points.items(), means, strict=True)
    ]  # fmt: skip
    return numbers, End(float(means[-1, 0]), float(means[-1, 1]), row.label, look)


def _draw_sqrt_kl(axes: Axes, row: Row, look: Look, points: dict[int, Array], names: tuple[str, str]) -> Drawn:
    """y against the square root of x, the true KL, with its initial linear range; arguments as for `_draw_curve`."""
    # the estimate of a small KL can be negative
    rooted = {s: np.stack([np.sqrt(np.maximum(p[:, 0], 0)), p[:, 1]], axis=1) for s, p in points.items()}
    means = np.array([pairs.mean(axis=0) for pairs in rooted.values()])
    axes.plot(*np.concatenate(list(rooted.values())).T, color=look.color, ls="", marker=look.marker, ms=3, alpha=0.3)
    axes.plot(*means.T, color=look.color, ls=look.line, lw=1.6)
    # the line starts at the SFT model, so step 0 must have been evaluated
    line = initial_line(list(rooted.values()), float(means[0, 1])) if 0 in points else None
    if line:
        _draw_linear_range(axes, line, look)
    fitted = {"linear_to": line.end, "slope": line.slope, "offset": line.offset, "bent": line.bent} if line else {}
    numbers = [
        {"metric": names[1], "row": row.label, "step": step, "sqrt_true_kl": x, "value": y,
         "replicates": len(rooted[step])} | fitted
        for step, (x, y) in zip(rooted, means, strict=True)
    ]  # fmt: skip
    return numbers, End(float(means[-1, 0]), float(means[-1, 1]), row.label, look)


def _draw_linear_range(axes: Axes, line: Line, look: Look) -> None:
    """A broad stroke over the initial linear range, with a bar at its end if training went beyond it."""
    end = line.offset + line.slope * line.end
    axes.plot([0, line.end], [line.offset, end], color=look.color, alpha=0.22, lw=7, solid_capstyle="butt", zorder=1)
    if line.bent:
        axes.plot(line.end, end, color=look.color, marker="|", ms=16, mew=2)


def _marker_for(look: Look, steps: Sequence[int]) -> str:
    """The marker of a curve; with more than 25 points they would merge into a thick line."""
    return look.marker if len(steps) <= 25 else ""


KINDS: dict[str, Callable[..., Drawn]] = {"curve": _draw_curve, "path": _draw_path, "sqrt_kl": _draw_sqrt_kl,
                                    "distance": _draw_curve}  # fmt: skip
