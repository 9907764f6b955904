"""`report.html`: one page that needs nothing beside it."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from rlhf.report.checks import warnings
from rlhf.report.recorded import RecordedRun
from rlhf.report.runs import Sweep
from rlhf.report.tables import Table
from rlhf.report.words import duration

PROMPTS = 6
# where a run stands and how its sweep is shown are no part of what it did
ELSEWHERE = (
    "output_dir",
    "name",
    "seed",
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
    said: Sequence[str],
    tables: Sequence[tuple[str, Table]],
    drawn: Sequence[Mapping[str, str]],
    folder: Path,
) -> str:
    """The page; `folder` is where the figures' files lie."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    return environment.get_template("page.html").render(
        title=sweep.layout.get("title") or sweep.finished[0].config.get("name") or "Report",
        notes=sweep.layout.get("notes"),
        said=said,
        warnings=warnings(sweep),
        tables=tables,
        figures=[{**figure, "image": _embedded(folder / f"{figure['name']}.svg")} for figure in drawn],
        samples=samples(sweep),
        runs=[_line(run, sweep.finished[0]) for run in sweep.runs],
        reference=sweep.finished[0].name,
    )


def samples(sweep: Sweep, prompts: int = PROMPTS) -> list[dict[str, Any]]:
    """Per prompt: what SFT and each row's first seed answered in the end."""
    first = sweep.finished[0].samples
    found = []
    for prompt in list(first)[:prompts]:
        answers = []
        for row in sweep.rows:
            steps = row.runs[0].samples.get(prompt, {})
            step = 0 if row.step == 0 else max(steps, default=0)
            if step in steps and (row.step == 0 or step > 0):
                answers.append({"row": row.label, **steps[step]})
        reference = next((answer.get("reference_output") for answer in answers), None)
        found.append({"prompt": prompt, "reference": reference, "answers": answers})
    return found


def config_difference(config: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    """`key=value` where a configuration departs from another."""
    ours, theirs = dict(_flat(config)), dict(_flat(reference))
    changed = [f"{key}={_short(value)}" for key, value in ours.items() if theirs.get(key, ELSEWHERE) != value]
    return changed + [f"{key}: absent" for key in theirs if key not in ours]


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        if not prefix and key in ELSEWHERE:
            continue
        if isinstance(value, dict) and value:
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(str, value)) + "]"
    return "null" if value is None else str(value)


def _line(run: RecordedRun, reference: RecordedRun) -> dict[str, Any]:
    done = run.state == "finished"
    return {
        "name": run.name,
        "state": run.state,
        "reason": run.reason,
        "overrides": " ".join(run.overrides),
        "time": duration(float(run.summary.get("wall_seconds") or 0)) if done else "",
        "same_as": run.summary.get("same_as"),
        "config": config_difference(run.config, reference.config) if done else [],
        "is_reference": run is reference,
    }


def _embedded(path: Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()
