"""How far a sweep is: the state of each intended run, by its files and by what SLURM says."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlhf.files import FAILED, METRICS, SUMMARY, read_object
from rlhf.sweep import slurm
from rlhf.sweep.plan import PLAN
from rlhf.tracking.reading import stepped_lines, try_object, try_summary

SILENT_SECONDS = 600  # a run that has written nothing for so long is not taken to be running


@dataclass(frozen=True)
class State:
    """One intended run: `done`, `failed`, `running`, `begun` (stopped half-way) or `waiting`."""

    folder: Path
    overrides: tuple[str, ...]
    state: str
    step: int = 0
    seconds: float | None = None
    reason: str = ""
    node: str = ""
    left: float | None = None  # seconds to its last step, at the pace of the latest ones


def states(folder: Path, queue: Mapping[str, slurm.Queued] | None = None) -> list[State]:
    """How far every run of the plan is; `queue` is what SLURM says of its jobs, where one asked."""
    return states_of(folder, read_object(folder / PLAN, runs=list), queue)


def states_of(folder: Path, plan: Mapping[str, Any], queue: Mapping[str, slurm.Queued] | None) -> list[State]:
    """How far every run of this plan is; trials that a search has yet to choose are waiting."""
    runs = [_state(folder / run["folder"], tuple(run["overrides"]), queue) for run in plan["runs"]]
    return runs + [State(folder, (), "waiting")] * plan.get("to_come", 0)


def queue(folder: Path) -> dict[str, slurm.Queued] | None:
    """What SLURM says of the jobs of a sweep's unfinished runs; None where it has none or does not answer."""
    runs = [folder / run["folder"] for run in read_object(folder / PLAN, runs=list)["runs"]]
    jobs = [job for run in runs if not (run / SUMMARY).exists() and (job := slurm.job_of(run).get("job"))]
    return slurm.queue(jobs) if jobs else None


def _state(folder: Path, overrides: tuple[str, ...], queue: Mapping[str, slurm.Queued] | None) -> State:
    if (folder / FAILED).exists():  # of its last start: a summary beside it is of a run of another configuration
        failed, fault = try_object(folder / FAILED)
        if not fault or not (folder / SUMMARY).exists():
            return State(folder, overrides, "failed", reason=str(failed.get("error") or fault))
    if (folder / SUMMARY).exists():
        summary, fault = try_summary(folder / SUMMARY)
        if fault:
            return State(folder, overrides, "failed", reason=fault)
        seconds = None if summary.get("same_as") else summary.get("wall_seconds")
        return State(folder, overrides, "done", seconds=seconds)
    lines = [line for line in stepped_lines(folder / METRICS) if line["step"] is not None]
    step = lines[-1]["step"] if lines else 0
    job = slurm.job_of(folder)
    if job and queue is not None:
        return _state_of_job(State(folder, overrides, "begun" if lines else "waiting", step), job, queue, lines)
    if not lines:
        return State(folder, overrides, "waiting")
    silent = abs(time.time() - (folder / METRICS).stat().st_mtime)  # the file's clock may be ahead of ours
    running = silent < SILENT_SECONDS
    left = _seconds_left(folder, lines) if running else None
    return State(folder, overrides, "running" if running else "begun", step, node=job.get("node", ""), left=left)


def _state_of_job(
    run: State, job: dict[str, Any], queue: Mapping[str, slurm.Queued], lines: list[dict[str, Any]]
) -> State:
    """An unfinished run whose job SLURM was asked about."""
    queued = queue.get(job["job"])
    if queued is None:
        reason = slurm.fate(job["job"]) or f"job {job['job']} is not in the queue any more"
        return replace(run, state="failed", reason=reason)
    if queued.state == "PENDING":
        return replace(run, reason=f"in the queue: {queued.reason}")
    return replace(run, state="running", node=queued.node, left=_seconds_left(run.folder, lines))


def _seconds_left(folder: Path, lines: list[dict[str, Any]]) -> float | None:
    """From the median pace of the latest steps; None before the second one."""
    config = folder / ".hydra" / "config.yaml"
    marks = [(line["step"], line["time"]) for line in lines if "ppo/reward" in line and "time" in line][-20:]
    if len(marks) < 2 or not config.exists():
        return None
    paces = [(t - s) / (b - a) for (a, s), (b, t) in pairwise(marks) if b > a and t > s]  # a clock may be set back
    steps = OmegaConf.load(config).ppo.steps
    return statistics.median(paces) * max(0, steps - marks[-1][0]) if paces else None


def seconds_left(runs: list[State], jobs: int, pace: float | None = None) -> float | None:
    """What the missing runs will take at the pace of the finished ones, else at `pace` seconds each; None without."""
    paces = [run.seconds for run in runs if run.seconds and run.seconds > 0] or ([pace] if pace else [])
    missing = sum(run.state in ("running", "begun", "waiting") for run in runs)
    return sum(paces) / len(paces) * missing / jobs if paces else None


def pace_of(folder: Path, config: DictConfig) -> float | None:
    """Seconds that a run will take, by finished runs of the same model and data anywhere in the outputs."""
    found = []
    for path in folder.parent.glob(f"*/*/{SUMMARY}"):
        summary, _ = try_summary(path)
        past = OmegaConf.create(summary.get("config") or {})
        alike = summary.get("stage") == "ppo" and not summary.get("same_as")
        name, data, steps = (OmegaConf.select(past, key) for key in ("model.name", "data._target_", "ppo.steps"))
        if alike and (name, data) == (config.model.name, config.data._target_) and steps:
            found.append(summary["wall_seconds"] / steps)
    return sum(found) / len(found) * config.ppo.steps if found else None


def counts(runs: list[State], jobs: int, pace: float | None = None) -> str:
    """The state of a sweep in a line."""
    parts = [f"{sum(run.state == 'done' for run in runs)} of {len(runs)} runs done"]
    parts += [
        f"{number} {state}"
        for state in ("running", "begun", "waiting", "failed")
        if (number := sum(run.state == state for run in runs))
    ]
    left = seconds_left(runs, jobs, pace)
    return ", ".join(parts) + (f"; about {left / 60:.0f} min left" if left else "")
