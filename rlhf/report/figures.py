"""The figures of a report, each with the numbers behind it.

A layout names them: `{name, title, kind, x, y, rows}` with the kinds `curve` (a metric against the step), `path` (two
metrics along training) and `sqrt_kl` (metrics against the square root of the true KL, with the straight beginning); and
`{name, title, kind: pull}`, which needs no runs: how strongly each estimator pulls against the distance.
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
from rlhf.report.figure_labels import End, label_column, label_points, make_room
from rlhf.report.figure_style import SETTINGS, Look, canvas, looks
from rlhf.report.linear_range import Line, initial_line
from rlhf.report.metric_info import metric_info
from rlhf.report.runs import Row, Sweep
from rlhf.report.statistics import Array, seed_error

KL = "eval/true_kl"
DEFAULT: list[dict[str, Any]] = [
    {"name": "win_rate", "title": "Win rate during PPO", "kind": "curve", "y": "eval/win_rate"},
    {"name": "true_kl", "title": "Distance from SFT during PPO", "kind": "curve", "y": KL},
    {"name": "response_tokens", "title": "Response length during PPO", "kind": "curve", "y": "eval/response_tokens"},
    {"name": "win_rate_by_kl", "title": "Win rate against distance from SFT", "kind": "path", "x": KL,
     "y": "eval/win_rate"},
]  # fmt: skip
Numbers = list[dict[str, Any]]
Looks = Mapping[str, Look]


def make_figures(sweep: Sweep, folder: Path) -> list[dict[str, str]]:
    """Draw what the layout asks for; returns {name, title, note} of every figure that has data."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = sweep.layout.get("figures")
    made = []
    for wanted in DEFAULT if asked is None else asked:
        with plt.rc_context(SETTINGS):
            drawn = draw_pull(wanted) if wanted.get("kind") == "pull" else _draw(sweep, wanted)
            if drawn is None:
                continue
            figure, numbers, note = drawn
            name = str(wanted["name"])
            figure.savefig(folder / f"{name}.png")
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)
        write_numbers(folder / f"{name}.csv", numbers)
        made.append({"name": name, "title": str(wanted.get("title", name)), "note": note})
    return made


def write_numbers(path: Path, numbers: Numbers) -> None:
    """The numbers behind a figure; a column that a line lacks stays empty."""
    header = list(dict.fromkeys(key for line in numbers for key in line))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, header, lineterminator="\n")
        writer.writeheader()
        writer.writerows(numbers)


def _draw(sweep: Sweep, wanted: Mapping[str, Any]) -> tuple[Figure, Numbers, str] | None:
    kind = wanted.get("kind")
    if kind not in KINDS or "name" not in wanted or "y" not in wanted:
        allowed = ", ".join([*KINDS, "pull"])
        raise FigureError(f"report.figures: {dict(wanted)} needs name, y and a kind; allowed: {allowed}")
    chosen = wanted.get("rows")
    rows = [row for row in sweep.trained if not chosen or any(row.is_called(name) for name in chosen)]
    ys = [wanted["y"]] if isinstance(wanted["y"], str) else list(wanted["y"])
    x = {"curve": "step", "sqrt_kl": KL}.get(kind, wanted.get("x", KL))
    ys = [y for y in ys if any(along(row, x, y) for row in rows)]
    if not ys:
        return None
    style = looks([row.label for row in sweep.trained])
    figure, panels = canvas(len(ys))
    numbers: Numbers = []
    labels: list[list[End]] = []
    for axes, y in zip(panels, ys, strict=True):
        labels.append([])
        for row in rows:
            points = along(row, x, y)
            if points:
                lines, end = KINDS[kind](axes, row, style[row.label], points, (x, y))
                numbers += lines
                labels[-1].append(end)
        axes.set_ylabel(metric_info(y).title)
        axes.set_xlabel("√ true KL (√nats per token)" if kind == "sqrt_kl" else metric_info(x).title)
    figure.suptitle(str(wanted.get("title", wanted["name"])), x=0.01, ha="left", fontsize=12, fontweight="bold")
    make_room(figure, labels)
    for axes, ends in zip(panels, labels, strict=True):
        (label_column if kind == "curve" else label_points)(axes, ends)
    return figure, numbers, NOTES[kind]


def draw_pull(wanted: Mapping[str, Any]) -> tuple[Figure, Numbers, str]:
    """The restoring pull of each estimator as a reward, relative to the KL's gradient, against the distance."""
    from rlhf.restoring_pull import DISTANCES, pulls  # torch, which no other figure waits for

    if "name" not in wanted:
        raise FigureError(f"report.figures: {dict(wanted)} needs a name")
    found = pulls()
    style = looks(list(found))
    figure, (axes,) = canvas(1)
    for name, numbers in found.items():
        look = style[name]
        axes.plot(DISTANCES, numbers, color=look.color, ls=look.line, marker=look.marker, ms=3.5)
    axes.set_xscale("log")
    axes.set_xlabel("KL from the reference (nats per token)")
    axes.set_ylabel("pull relative to the KL's gradient")
    figure.suptitle(str(wanted.get("title", wanted["name"])), x=0.01, ha="left", fontsize=12, fontweight="bold")
    ends = [End(DISTANCES[-1], numbers[-1], name, style[name]) for name, numbers in found.items()]
    make_room(figure, [ends])
    label_column(axes, ends)
    lines = [
        {"estimator": name, "kl": distance, "pull": pull}
        for name, numbers in found.items()
        for distance, pull in zip(DISTANCES, numbers, strict=True)
    ]
    return figure, lines, NOTES["pull"]


def along(row: Row, x: str, y: str) -> dict[int, Array]:
    """Step → [seeds, 2]: what the runs had of x and y, in readers' units."""
    found: dict[int, list[tuple[float, float]]] = {}
    for run in row.runs:
        for step, values in sorted(run.metrics.items()):
            pair = (values.get(x), values.get(y))
            # a run that diverged logs nan; the page warns of it
            if all(isinstance(value, int | float) and math.isfinite(value) for value in pair):
                found.setdefault(step, []).append((metric_info(x).scale * values[x], metric_info(y).scale * values[y]))
    return {step: np.asarray(pairs, float) for step, pairs in sorted(found.items())}


Drawn = tuple[Numbers, End]


def _curve(axes: Axes, row: Row, look: Look, points: dict[int, Array], names: tuple[str, str]) -> Drawn:
    steps, means = list(points), np.array([pairs[:, 1].mean() for pairs in points.values()])
    errors = np.array([seed_error(pairs[:, 1]) for pairs in points.values()])
    band = np.nan_to_num(errors)
    axes.fill_between(steps, means - band, means + band, color=look.color, alpha=0.13, lw=0)
    axes.plot(steps, means, color=look.color, ls=look.line, marker=_marker(look, steps), ms=3.5)
    numbers = [
        {"row": row.label, "step": step, names[1]: mean, "se": error, "seeds": len(points[step])}
        for step, mean, error in zip(steps, means, errors, strict=True)
    ]
    return numbers, End(steps[-1], float(means[-1]), row.label, look)


def _path(axes: Axes, row: Row, look: Look, points: dict[int, Array], names: tuple[str, str]) -> Drawn:
    means = np.array([pairs.mean(axis=0) for pairs in points.values()])
    axes.plot(*means.T, color=look.color, ls=look.line, marker=look.marker, ms=4, lw=1.4)
    numbers = [
        {"row": row.label, "step": step, names[0]: x, names[1]: y, f"{names[0]} se": seed_error(pairs[:, 0]),
         f"{names[1]} se": seed_error(pairs[:, 1]), "seeds": len(pairs)}
        for (step, pairs), (x, y) in zip(points.items(), means, strict=True)
    ]  # fmt: skip
    return numbers, End(float(means[-1, 0]), float(means[-1, 1]), row.label, look)


def _sqrt_kl(axes: Axes, row: Row, look: Look, points: dict[int, Array], names: tuple[str, str]) -> Drawn:
    # an estimate of a small KL may fall below zero
    rooted = {s: np.stack([np.sqrt(np.maximum(p[:, 0], 0)), p[:, 1]], axis=1) for s, p in points.items()}
    means = np.array([pairs.mean(axis=0) for pairs in rooted.values()])
    axes.plot(*np.concatenate(list(rooted.values())).T, color=look.color, ls="", marker=look.marker, ms=3, alpha=0.3)
    axes.plot(*means.T, color=look.color, ls=look.line, lw=1.6)
    line = initial_line(list(rooted.values()), float(means[0, 1])) if 0 in points else None
    if line:
        _mark(axes, line, look)
    fitted = {"linear_to": line.end, "slope": line.slope, "offset": line.offset, "bent": line.bent} if line else {}
    numbers = [
        {"metric": names[1], "row": row.label, "step": step, "sqrt_true_kl": x, "value": y, "seeds": len(rooted[step])}
        | fitted
        for step, (x, y) in zip(rooted, means, strict=True)
    ]
    return numbers, End(float(means[-1, 0]), float(means[-1, 1]), row.label, look)


def _mark(axes: Axes, line: Line, look: Look) -> None:
    end = line.offset + line.slope * line.end
    axes.plot([0, line.end], [line.offset, end], color=look.color, alpha=0.22, lw=7, solid_capstyle="butt", zorder=1)
    if line.bent:
        axes.plot(line.end, end, color=look.color, marker="|", ms=16, mew=2)


def _marker(look: Look, steps: Sequence[int]) -> str:
    return look.marker if len(steps) <= 25 else ""


KINDS: dict[str, Callable[..., Drawn]] = {"curve": _curve, "path": _path, "sqrt_kl": _sqrt_kl}
NOTES = {
    "pull": "By enumeration on a toy policy, not from these runs: how much of the KL's gradient an estimator has when"
    " it is a reward. 1: all of it; 0: it does not pull.",
    "curve": "Mean over seeds; the band is ± one standard error (the table says how often that holds the true mean).",
    "path": "Evaluations along training, joined in order; means over seeds. It begins at the SFT model.",
    "sqrt_kl": "Points: every evaluation of every seed; lines: means over seeds. The broad stroke is the straight line"
    " from the SFT model fitted to the longest beginning that does not bend (none where it bends within three"
    " evaluations); a bar marks its end where training went on beyond it.",
}
