"""The figures of a report, each as PNG and SVG with its numbers as CSV.

The configuration lists them under `report.figures`, each as `{name, title, kind, x, y, rows}`. The kinds are:

- `curve`: a metric against the PPO step;
- `path`: one metric against another along training;
- `sqrt_kl`: metrics against the square root of the true KL, with the initial linear range;
- `distance`: the same at equal distances instead of equal steps, as means over replicates where all of them got to;
- `pull`, with only a name and a title: the restoring pull of each estimator. It needs no runs;
- `results`, `gains`, `differences` and `diagnostics`, with only a name and a title: the means of all rows with their
  intervals, their differences from SFT and from the baseline, and what PPO logs about itself; of a search, `front`
  instead of the first three. Every report has these, unless its list of figures is empty.
"""

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from rlhf.errors import FigureError
from rlhf.report.comparisons import origins
from rlhf.report.course_figures import KINDS, Scene, draw_courses
from rlhf.report.courses import Course, Numbers, Points
from rlhf.report.diagnostics_figure import draw_diagnostics
from rlhf.report.equal_distance import KL, along_distance
from rlhf.report.figure_labels import End, label_column, make_room
from rlhf.report.figure_style import SETTINGS, canvas, looks, save, set_title
from rlhf.report.forest import draw_differences, draw_gains, draw_results
from rlhf.report.front_figure import draw_front
from rlhf.report.metric_info import metric_info
from rlhf.report.rows import Row
from rlhf.report.runs import Sweep
from rlhf.report.statistics import Array

ROOTED = ("sqrt_kl", "distance")  # the kinds with the square root of the true KL on the x axis
# of every report
ALWAYS: list[dict[str, Any]] = [
    {"name": "results", "title": "Results with 95 % intervals", "kind": "results"},
    {"name": "front", "title": "The front of the search", "kind": "front"},
    {"name": "gains", "title": "Differences from SFT with 95 % intervals", "kind": "gains"},
    {"name": "differences", "title": "Differences from the baseline with 95 % intervals", "kind": "differences"},
    {"name": "diagnostics", "title": "PPO's diagnostics", "kind": "diagnostics"},
]
# for a layout without `figures`
DEFAULT: list[dict[str, Any]] = [
    {"name": "win_rate", "title": "Win rate during PPO", "kind": "curve", "y": "eval/win_rate"},
    {"name": "true_kl", "title": "Distance from SFT during PPO", "kind": "curve", "y": KL},
    {"name": "response_tokens", "title": "Response length during PPO", "kind": "curve", "y": "eval/response_tokens"},
    {"name": "win_rate_by_kl", "title": "Win rate against distance from SFT", "kind": "path", "x": KL,
     "y": "eval/win_rate"},
]  # fmt: skip
WHOLE = {
    "results": draw_results, "front": draw_front, "gains": draw_gains, "differences": draw_differences,
    "diagnostics": draw_diagnostics,
}  # fmt: skip
FAMILIES = (
    "Filled: significant after Holm's correction, for which the metrics in which the report compares rows are one"
    " family and all others together another. A metric without a value per instruction is compared over replicates"
    " alone (Student's t)."
)
# what the page says below a figure, by kind
NOTES = {
    "pull": "By enumeration on a toy policy, not from these runs: the share of the KL's gradient that an estimator has"
    " when it is used as a reward. 1: all of it; 0: it does not pull.",
    "curve": "Mean over replicates; the band is ± one standard error (the table says what replicates are, and how often"
    " that covers the true mean). Dotted: the SFT model.",
    "distance": "Mean over replicates ± one standard error when √KL first gets to a value, interpolated between"
    " evaluations, as far as all replicates went. Dotted: the SFT model.",
    "path": "Evaluations during training, joined in order, as means over replicates ± one standard error in both"
    " directions. Paths start at the SFT model.",
    "sqrt_kl": "Points: every evaluation of every replicate; lines: their means. The fine dots are a straight line from"
    " the SFT model, fitted to the longest initial range that does not bend (absent if it bends within the first three"
    " evaluations). A bar marks its end if training went beyond it.",
    "results": "Means with 95 % intervals, which count replicates and instructions. Dotted: the SFT model.",
    "front": "Every configuration in the first two objectives, as means over replicates. Filled: no other is as good in"
    " all objectives and better in one. The numbers are the lines of the table.",
    "gains": f"Each row minus SFT. {FAMILIES}",
    "differences": f"Each row minus the baseline, if the layout names one. {FAMILIES}",
    "diagnostics": "What PPO logs at every step, as means over all runs of a row.",
}


def make_figures(sweep: Sweep, folder: Path) -> list[dict[str, str]]:
    """Draw the figures of the layout, or the default ones, into `folder`.

    Returns:
        {name, title, note, kind} of every figure; those for which no run has data are left out.

    Raises:
        FigureError: a figure lacks a key or is of no known kind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for spec in _with_always(figure_specs(sweep.layout)):
        kind, name = _checked(spec)
        with plt.rc_context(SETTINGS):
            drawn = _draw(sweep, spec)
            if drawn is None:
                continue
            figure, numbers = drawn
            save(figure, folder, name)
        write_numbers(folder / f"{name}.csv", numbers)
        made.append({"name": name, "title": str(spec.get("title", name)), "note": NOTES[kind], "kind": kind})
    return made


def write_numbers(path: Path, numbers: Numbers) -> None:
    """Write the numbers of a figure as CSV; keys that a line lacks are left empty."""
    header = list(dict.fromkeys(key for line in numbers for key in line))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, header, lineterminator="\n")
        writer.writeheader()
        writer.writerows(numbers)


def _with_always(specs: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The layout's figures with those of every report that it does not list itself, unless it wants none at all."""
    listed = {spec.get("kind") for spec in specs}
    first, last = (
        [spec for spec in ALWAYS if spec["kind"] not in listed and (spec["kind"] == "diagnostics") == late]
        for late in (False, True)
    )
    return [*first, *specs, *last] if specs else []


def _checked(spec: Mapping[str, Any]) -> tuple[str, str]:
    """Kind and name of a figure.

    Raises:
        FigureError: it lacks one of its keys, or its kind is unknown.
    """
    kind = str(spec.get("kind"))
    if kind not in NOTES or "name" not in spec or (kind in KINDS and "y" not in spec):
        allowed = ", ".join([*KINDS, *(name for name in NOTES if name not in KINDS)])
        raise FigureError(f"report.figures: {dict(spec)} needs name, y and a kind; allowed: {allowed}")
    return kind, str(spec["name"])


def _draw(sweep: Sweep, spec: Mapping[str, Any]) -> tuple[Figure, Numbers] | None:
    """A figure with its numbers, or None if no row has data for it."""
    title = str(spec.get("title", spec["name"]))
    if spec["kind"] == "pull":
        return draw_pull(title)
    if spec["kind"] in WHOLE:
        return WHOLE[spec["kind"]](sweep, title)
    chosen = spec.get("rows")
    rows = [row for row in sweep.trained if not chosen or any(row.is_called(name) for name in chosen)]
    x = x_metric(spec)
    courses = {y: _courses(rows, str(spec["kind"]), x, y) for y in y_metrics(spec)}
    found = {y: each for y, each in courses.items() if each}
    if not found:
        return None
    return draw_courses(
        Scene(
            title=title,
            kind=str(spec["kind"]),
            courses=found,
            # looks depend on all rows, so that a row has the same colour in every figure
            looks=looks([row.label for row in sweep.trained]),
            against=origins(sweep)[-1].label,
            starts={y: start for y in found if (start := _start(sweep, y)) is not None},
            x_title="√ true KL (√nats per token)" if spec["kind"] in ROOTED else metric_info(x).title,
        )
    )


def _courses(rows: list[Row], kind: str, x: str, y: str) -> list[Course]:
    """The courses of the rows that have the metric."""
    names = ("sqrt_true_kl" if kind == "distance" else x, y)
    points: dict[str, Points] = {
        row.label: along_distance(row, y) if kind == "distance" else along(row, x, y) for row in rows
    }
    return [Course(label, names, found) for label, found in points.items() if found]


def _start(sweep: Sweep, metric: str) -> float | None:
    """The mean of an evaluated metric over the SFT models, in display units."""
    values = [value for value in sweep.rows[0].values(metric) if math.isfinite(value)]
    return metric_info(metric).scale * float(np.mean(values)) if values else None


def draw_pull(title: str) -> tuple[Figure, Numbers]:
    """The restoring pull of each estimator used as a reward, relative to the KL's gradient, against the KL."""
    from rlhf.restoring_pull import DISTANCES, pulls  # imports torch, which the other figures do not need

    found = pulls()
    style = looks(list(found))
    figure, (axes,) = canvas(1)
    for name, numbers in found.items():
        look = style[name]
        axes.plot(DISTANCES, numbers, color=look.color, ls=look.line, marker=look.marker, ms=3.5)
    axes.set_xscale("log")
    axes.set_xlabel("KL from the reference (nats per token)")
    axes.set_ylabel("pull relative to the KL's gradient")
    set_title(figure, title)
    ends = [End(DISTANCES[-1], numbers[-1], name, style[name]) for name, numbers in found.items()]
    make_room(figure, [ends])
    label_column(axes, ends)
    lines = [
        {"estimator": name, "kl": distance, "pull": pull}
        for name, numbers in found.items()
        for distance, pull in zip(DISTANCES, numbers, strict=True)
    ]
    return figure, lines


def figure_specs(layout: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The figures that a layout lists, or `DEFAULT` if it does not say; an empty list means no figures."""
    specs = layout.get("figures")
    return list(DEFAULT if specs is None else specs)


def x_metric(spec: Mapping[str, Any]) -> str:
    """The metric on the x axis of a figure: given by its kind, or else its `x`, the true KL by default."""
    return {"curve": "step", **dict.fromkeys(ROOTED, KL)}.get(str(spec["kind"]), str(spec.get("x", KL)))


def y_metrics(spec: Mapping[str, Any]) -> list[str]:
    """The metrics on the y axes of a figure, one per panel; none for the kinds that choose their own."""
    y = spec.get("y", [])
    return [y] if isinstance(y, str) else list(y)


def along(row: Row, x: str, y: str) -> Points:
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
