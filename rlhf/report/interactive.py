"""The interactive view of the page: every run's evaluations by step and by √KL, drawn by Bokeh inside the page.

Hovering over a point shows its run, row, replicate and value. The rows are switched on and off by checkboxes of the
page, which are plain HTML, so that they wrap on a narrow screen and can be used from the keyboard.
"""

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from rlhf.report.equal_distance import KL, METRICS
from rlhf.report.figure_style import DARK, Look, looks
from rlhf.report.metric_info import metric_info
from rlhf.report.recorded_run import RecordedRun
from rlhf.report.results import columns
from rlhf.report.rows import Row
from rlhf.report.runs import Sweep

DASHES = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "dotdash"}
GREY = "#858c93"  # of axes and labels: legible on a light and on a dark page
SHOWN, TITLE = "shown", "title"  # the columns of the chosen metric: its values and its name, with the unit
# What is shown of the point under the mouse.
TIP = f"""<div><strong>@row</strong>, step @step<br>@{TITLE}: <strong>@{SHOWN}{{0.000}}</strong><br>
√KL: @sqrt_kl{{0.000}}<br>run: @run<br>seeds: @seeds</div>"""
X_TITLES = {"step": "PPO step", "sqrt_kl": "√ true KL (√nats per token)"}


def interactive_view(sweep: Sweep) -> dict[str, Any] | None:
    """What the page needs for the view, or None if Bokeh is not installed or no run was evaluated.

    Returns:
        {library, script, plots, rows, metrics}: the JavaScript library and the script that draws; the HTML that the
        plots appear in; {label, color, dark, line} of each row, whose colour on a dark page is another; {key, title}
        of each metric that can be chosen.
    """
    metrics = view_metrics(sweep)
    if find_spec("bokeh") is None or not metrics:
        return None
    from bokeh.embed import components
    from bokeh.models import ColumnDataSource
    from bokeh.resources import Resources

    style = looks([row.label for row in sweep.trained])
    data = [row_data(row, metrics) for row in sweep.trained]
    title = metric_info(metrics[0]).title
    sources = [ColumnDataSource({**each, SHOWN: each[metrics[0]], TITLE: [title] * len(each["row"])}) for each in data]
    # runs without a KL have no second plot
    axes = [x for x in X_TITLES if any(math.isfinite(value) for each in data for value in each[x])]
    script, plots = components({x: _figure(x, metrics[0], sources, list(style.values())) for x in axes}, False)
    return {
        "library": _inside_script(Resources(mode="inline", components=["bokeh"]).js_raw[0]),
        "script": _inside_script(script),
        "plots": list(plots.values()),
        "rows": [
            {
                "label": label,
                "color": look.color,
                "dark": DARK.get(look.color, look.color),
                "line": "dashed" if look.line == "-." else DASHES[look.line],
            }
            for label, look in style.items()
        ],
        "metrics": [{"key": metric, "title": metric_info(metric).title} for metric in metrics],
    }


def view_metrics(sweep: Sweep) -> list[str]:
    """The evaluated metrics that can be chosen: those of the main table that runs have during training."""
    wanted = dict.fromkeys([*(metric for metric in METRICS if metric in columns(sweep)), *columns(sweep)])
    runs = [run for row in sweep.trained for run in row.runs]
    return [metric for metric in wanted if any(metric in values for run in runs for values in run.evaluations.values())]


def row_data(row: Row, metrics: list[str]) -> dict[str, list[Any]]:
    """Column → values of all evaluations of a row's runs, in display units, with a gap (NaN) after every run."""
    found: dict[str, list[Any]] = {key: [] for key in ("run", "row", "seeds", *X_TITLES, *metrics)}
    for run in row.runs:
        for step, values in run.evaluations.items():
            kl = _number(values.get(KL))
            line = {"step": step, "sqrt_kl": math.sqrt(max(kl, 0.0)) if math.isfinite(kl) else kl}
            line |= {metric: metric_info(metric).scale * _number(values.get(metric)) for metric in metrics}
            _append(found, run, row.label, line)
        _append(found, run, row.label, dict.fromkeys((*X_TITLES, *metrics), math.nan))
    return found


def _append(found: dict[str, list[Any]], run: RecordedRun, label: str, line: Mapping[str, float]) -> None:
    """Add an evaluation to the columns."""
    seeds = ", ".join(f"{name} {seed}" for name, seed in run.seeds._asdict().items())
    for key, value in {"run": run.name, "row": label, "seeds": seeds, **line}.items():
        found[key].append(value)


def _figure(x: str, metric: str, sources: Sequence[Any], style: Sequence[Look]) -> Any:
    """One plot: every run as a line with a point per evaluation. Renderers are tagged with their row's position."""
    from bokeh.models import HoverTool
    from bokeh.plotting import figure

    plot: Any = figure(
        height=380, sizing_mode="stretch_width", tools="pan,box_zoom,wheel_zoom,reset,save", active_drag="box_zoom",
        active_scroll=None, x_axis_label=X_TITLES[x], y_axis_label=metric_info(metric).title,
        background_fill_color=None, border_fill_color=None, outline_line_color=None, output_backend="svg",
    )  # fmt: skip
    points = []
    for i, (source, look) in enumerate(zip(sources, style, strict=True)):
        color, dash = look.color, DASHES[look.line]
        line = plot.line(x, SHOWN, source=source, color=color, line_dash=dash, line_width=1.3, alpha=0.65)
        points.append(plot.scatter(x, SHOWN, source=source, color=color, size=6, alpha=0.85))
        line.tags = points[-1].tags = ["row", i]
    plot.add_tools(HoverTool(renderers=points, tooltips=TIP))
    for axis in plot.axis:
        axis.update(axis_label_text_color=GREY, major_label_text_color=GREY, axis_line_color=GREY)
        axis.update(major_tick_line_color=GREY, minor_tick_line_color=None, axis_label_text_font_style="normal")
    plot.x_range.only_visible = plot.y_range.only_visible = True
    plot.grid.grid_line_color = GREY
    plot.grid.grid_line_alpha = 0.25
    plot.toolbar.logo = None
    return plot


def _inside_script(code: str) -> str:
    """JavaScript that does not end the element that it stands in, whatever a row is called."""
    return code.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _number(value: Any) -> float:
    """A logged value; NaN if there is none."""
    return float(value) if isinstance(value, int | float) else math.nan
