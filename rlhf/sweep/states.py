"""The state of every run of a sweep, from the files in its folder and from SLURM's queue."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlhf.files import FAILED, METRICS, PLAN, SUMMARY, read_object
from rlhf.files.locks import is_held, last_holder
from rlhf.policy_settings import METHODS
from rlhf.sweep import slurm
from rlhf.sweep.building import Builders, builders
from rlhf.tracking.overrides import distinguishing, in_all
from rlhf.tracking.reading import stepped_lines, try_object, try_summary
from rlhf.tracking.run_folder import HYDRA, LOCK

# Where a lock cannot be asked, a run whose metrics file has not changed for this long is taken to have stopped.
SILENT_SECONDS = 600
# What a running run shows of its metrics, under short names, each with the factor that it is shown with.
SHOWN = {"ppo/reward": ("reward", 1), "dpo/loss": ("loss", 1), "best_of_n/loss": ("loss", 1),
         "eval/win_rate": ("win %", 100), "eval/true_kl": ("KL", 1)}  # fmt: skip
TITLES = {"ppo": "PPO", "dpo": "DPO", "best_of_n": "best of n", "expert_iteration": "expert iteration"}


@dataclass(frozen=True)
class RunState:
    """A planned run and how far it is.

    Attributes:
        folder: where the run is, or will be.
        overrides: what distinguishes it from the others.
        state: `done`, `failed`, `running`, `begun` (stopped between two steps) or `waiting`.
        step: last logged step.
        seconds: wall time of a finished run; None if it was taken over from another one.
        reason: why it failed, or what its job waits for in the queue.
        node: where it runs.
        left: estimated seconds until its last step.
        doing: where it is: `PPO 12/40`, or what it builds before that, such as `SFT 12/25`.
        metrics: the latest values of `SHOWN`, by their short names.
    """

    folder: Path
    overrides: tuple[str, ...]
    state: str
    step: int = 0
    seconds: float | None = None
    reason: str = ""
    node: str = ""
    left: float | None = None
    doing: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)


# -- states ----------------------------------------------------------------------------------------------------------


def states(folder: Path, queue: Mapping[str, slurm.QueuedJob] | None = None) -> list[RunState]:
    """The state of every run in the plan of a sweep's folder.

    Args:
        folder: the sweep's folder, with a `plan.json`.
        queue: the result of `sweep_queue`; without it, states are read from files only.
    """
    return states_of_plan(folder, read_object(folder / PLAN, runs=list), queue)


def earlier_states(folder: Path) -> list[RunState]:
    """The state of runs that earlier sweeps have planned in a sweep's folder, and the present one has not."""
    return states_of_plan(folder, {"runs": read_object(folder / PLAN).get("earlier", [])}, None)


def states_of_plan(
    folder: Path, plan: Mapping[str, Any], queue: Mapping[str, slurm.QueuedJob] | None
) -> list[RunState]:
    """The state of every run of `plan`; trials that a search has not chosen yet are waiting."""
    building = builders(folder)
    runs = [_state(folder / run["folder"], tuple(run["overrides"]), queue, building) for run in plan["runs"]]
    return runs + [RunState(folder, (), "waiting")] * plan.get("to_come", 0)


def sweep_queue(folder: Path) -> dict[str, slurm.QueuedJob] | None:
    """The queued jobs of a sweep's unfinished runs; None if no run has a job, or SLURM does not answer."""
    runs = [folder / run["folder"] for run in read_object(folder / PLAN, runs=list)["runs"]]
    jobs = [job for run in runs if not (run / SUMMARY).exists() and (job := slurm.read_job(run).get("job"))]
    return slurm.squeue(jobs) if jobs else None


def _state(
    folder: Path, overrides: tuple[str, ...], queue: Mapping[str, slurm.QueuedJob] | None, building: Builders
) -> RunState:
    """The state of the run in `folder`, which may not exist yet."""
    # 1. failed.json is deleted at every start, so a summary beside it is older and another configuration's
    if (folder / FAILED).exists():
        failed, fault = try_object(folder / FAILED)
        if not fault or not (folder / SUMMARY).exists():
            return RunState(folder, overrides, "failed", _last_step(folder), reason=str(failed.get("error") or fault))
    # 2. a summary is written last
    if (folder / SUMMARY).exists():
        summary, fault = try_summary(folder / SUMMARY)
        if fault:
            return RunState(folder, overrides, "failed", _last_step(folder), reason=fault)
        seconds = None if summary.get("same_as") else summary.get("wall_seconds")
        return RunState(folder, overrides, "done", seconds=seconds)
    # 3. an unfinished run: SLURM knows best whether it is under way
    lines = _lines_with_step(folder)
    step = lines[-1]["step"] if lines else 0
    job = slurm.read_job(folder)
    if job and queue is not None:
        return _state_of_job(RunState(folder, overrides, "begun" if lines else "waiting", step), job, queue, lines)
    # 4. without SLURM, by its lock
    if not _is_under_way(folder, bool(lines)):
        return RunState(folder, overrides, "begun" if lines else "waiting", step)
    return _running(RunState(folder, overrides, "running", step, node=job.get("node", "")), lines, building)


def _is_under_way(folder: Path, begun: bool) -> bool:
    """Whether a process works in the folder of an unfinished run: its lock says so, else the age of its metrics."""
    held = is_held(folder / LOCK)
    if held is not None or not begun:
        return bool(held)
    silent = abs(time.time() - (folder / METRICS).stat().st_mtime)  # the file server's clock may be ahead of ours
    return silent < SILENT_SECONDS


def _running(run: RunState, lines: list[dict[str, Any]], building: Builders) -> RunState:
    """A run that is under way, with what it does, its latest metrics and the time left."""
    if not lines:
        holder = last_holder(run.folder / LOCK)
        return replace(run, doing=building.get(holder, "preparing") if holder else "preparing")
    latest = {key: value for line in lines for key, value in line.items() if isinstance(value, int | float)}
    shown = {name: latest[key] * factor for key, (name, factor) in SHOWN.items() if key in latest}
    method, steps = _method_and_steps(run.folder)
    of = f"/{steps}" if steps else ""
    left = _run_seconds_left(run.folder, lines)
    return replace(run, doing=f"{TITLES.get(method, method)} {run.step}{of}", metrics=shown, left=left)


def _lines_with_step(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run, without lines of a stage that has no steps."""
    return [line for line in stepped_lines(folder / METRICS) if line["step"] is not None]


def _last_step(folder: Path) -> int:
    """The last logged step of a run, 0 without metrics."""
    lines = _lines_with_step(folder)
    return lines[-1]["step"] if lines else 0


def _state_of_job(
    run: RunState, job: dict[str, Any], queue: Mapping[str, slurm.QueuedJob], lines: list[dict[str, Any]]
) -> RunState:
    """The state of an unfinished run from SLURM's queue."""
    queued = queue.get(job["job"])
    if queued is None:
        reason = slurm.end_reason(job["job"]) or f"job {job['job']} is not in the queue any more"
        return replace(run, state="failed", reason=reason)
    if queued.state == "PENDING":
        return replace(run, reason=f"in the queue: {queued.reason}")
    return _running(replace(run, state="running", node=queued.node), lines, {})


def names(runs: list[RunState]) -> dict[Path, str]:
    """Folder → what distinguishes the run from the others: on a terminal a shorter name than its folder's."""
    common = in_all(run.overrides for run in runs if run.overrides)
    return {run.folder: distinguishing(run.overrides, common) or run.folder.name for run in runs}


# -- time ------------------------------------------------------------------------------------------------------------


def _run_seconds_left(folder: Path, lines: list[dict[str, Any]]) -> float | None:
    """Seconds to the last step of a run at the median pace of its latest 20 steps; None before its second step."""
    method, steps = _method_and_steps(folder)
    if steps is None:
        return None
    trained = {"ppo": "ppo/reward", "dpo": "dpo/loss"}.get(method, "best_of_n/loss")
    marks = [(line["step"], line["time"]) for line in lines if trained in line and "time" in line][-20:]
    paces = [(t - s) / (b - a) for (a, s), (b, t) in pairwise(marks) if b > a and t > s]  # clocks can be set back
    return statistics.median(paces) * max(0, steps - marks[-1][0]) if paces else None


def _method_and_steps(folder: Path) -> tuple[str, int | None]:
    """The method of a run and the number of its steps, from its configuration; ("ppo", None) without one."""
    config = folder / HYDRA / "config.yaml"
    return _read_method(config, config.stat().st_mtime_ns) if config.exists() else ("ppo", None)


@lru_cache(maxsize=1024)  # a display asks again and again, and YAML is slow to read
def _read_method(config: Path, changed: int) -> tuple[str, int | None]:
    found: Any = OmegaConf.load(config)
    stage = OmegaConf.select(found, "stage.name")
    method = stage if stage in METHODS else "ppo"
    return method, OmegaConf.select(found, f"{method}.steps")


def seconds_left(runs: list[RunState], jobs: int, seconds_per_run: float | None = None) -> float | None:
    """Seconds until all runs are done, `jobs` of them at once.

    A missing run is taken to last as long as the mean finished one, else `seconds_per_run`; None if neither is known.
    """
    finished = [run.seconds for run in runs if run.seconds and run.seconds > 0]
    known = finished or ([seconds_per_run] if seconds_per_run else [])
    missing = sum(run.state in ("running", "begun", "waiting") for run in runs)
    return sum(known) / len(known) * missing / jobs if known else None


def expected_seconds(folder: Path, config: DictConfig) -> float | None:
    """Expected wall seconds of a run of `config`, from earlier runs; None if there are none.

    Uses the mean seconds per step of all finished runs of the same method with the same model and data class below the
    parent of the sweep's `folder`.
    """
    method = config.stage.name if config.stage.name in METHODS else "ppo"
    found = []
    for path in folder.parent.glob(f"*/*/{SUMMARY}"):
        summary, _ = try_summary(path)
        past = OmegaConf.create(summary.get("config") or {})
        trained = summary.get("stage") == method and not summary.get("same_as")
        name, data, steps = (OmegaConf.select(past, key) for key in ("model.name", "data._target_", f"{method}.steps"))
        if trained and (name, data) == (config.model.name, config.data._target_) and steps:
            found.append(summary["wall_seconds"] / steps)
    return sum(found) / len(found) * config[method].steps if found else None


def progress_line(runs: list[RunState], jobs: int, seconds_per_run: float | None = None) -> str:
    """`3 of 8 runs done, 2 running, 3 waiting; about 12 min left` (arguments as of `seconds_left`)."""
    parts = [f"{sum(run.state == 'done' for run in runs)} of {len(runs)} runs done"]
    parts += [
        f"{number} {state}"
        for state in ("running", "begun", "waiting", "failed")
        if (number := sum(run.state == state for run in runs))
    ]
    left = seconds_left(runs, jobs, seconds_per_run)
    time = f"about {left / 60:.0f} min" if left and left >= 60 else "less than a minute"
    return ", ".join(parts) + (f"; {time} left" if left else "")
