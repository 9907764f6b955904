"""`report.html`: a self-contained page, with figures and styles embedded."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from rlhf.report.checks import warnings
from rlhf.report.interactive import interactive_view
from rlhf.report.recorded_run import RecordedRun
from rlhf.report.runs import Sweep
from rlhf.report.samples import RULE, samples
from rlhf.report.tables import Table
from rlhf.report.text import duration
from rlhf.tracking.overrides import distinguishing, in_all
from rlhf.tracking.seeds import SEED_KEYS

# top-level keys that the table of runs omits, besides seeds: they say where a run is stored and how its sweep is shown
UNSHOWN = (
    "output_dir",
    "name",
    "resume",
    "dry_run",
    "report",
    "logger",
    "experiments",
    "sweeps",
    "objectives",
)


def render(
    sweep: Sweep,
    findings: Sequence[str],
    tables: Sequence[tuple[str, Table]],
    figures: Sequence[Mapping[str, str]],
    folder: Path,
) -> str:
    """The HTML of the page.

    Args:
        sweep: the runs.
        findings: the sentences of the summary.
        tables: (heading, table).
        figures: {name, title, note} of every figure, as `make_figures` returns them.
        folder: the folder that holds the figures' SVG files.
    """
    common = in_all(run.overrides for run in sweep.runs)
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    return environment.get_template("page.html").render(
        title=sweep.layout.get("title") or sweep.finished[0].config.get("name") or "Report",
        notes=sweep.layout.get("notes"),
        findings=findings,
        warnings=warnings(sweep),
        tables=tables,
        figures=[{**figure, "image": _embedded(folder / f"{figure['name']}.svg")} for figure in figures],
        interactive=interactive_view(sweep) if figures else None,
        samples=samples(sweep),
        rule=RULE,
        runs=[_run_entry(run, sweep.names[run.folder], sweep.finished[0], common) for run in sweep.runs],
        common=" ".join(common),
        reference=sweep.names[sweep.finished[0].folder],
    )


def config_difference(config: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    """`key=value` for every key whose value differs from the reference, `key: absent` for every key it lacks."""
    own, other = dict(_flat(config)), dict(_flat(reference))
    changed = [f"{key}={_value_text(value)}" for key, value in own.items() if key not in other or other[key] != value]
    return changed + [f"{key}: absent" for key in other if key not in own]


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) for every leaf of a configuration, without the keys that are not shown."""
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        if (not prefix and key in UNSHOWN) or f"{prefix}{key}" in SEED_KEYS:
            continue
        if isinstance(value, dict) and value:
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def _value_text(value: Any) -> str:
    """A value as in an override."""
    if isinstance(value, list):
        return "[" + ", ".join(map(str, value)) + "]"
    return "null" if value is None else str(value)


def _run_entry(run: RecordedRun, name: str, reference: RecordedRun, common: Sequence[str]) -> dict[str, Any]:
    """A line of the page's table of runs; `name`: what it is called, `common`: the overrides of all of them."""
    finished = run.state == "finished"
    return {
        "name": name,
        "folder": run.name,
        "state": run.state,
        "reason": run.reason,
        "overrides": distinguishing(run.overrides, common),
        "time": duration(float(run.summary.get("wall_seconds") or 0)) if finished else "",
        "same_as": run.summary.get("same_as"),
        "config": config_difference(run.config, reference.config) if finished else [],
        "is_reference": run is reference,
    }


def _embedded(path: Path) -> str:
    """An SVG file as a data URI."""
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()
