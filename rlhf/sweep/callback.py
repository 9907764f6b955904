"""What a sweep intends, how far it is, and what happens at its end. Imported by Hydra's callback: no torch here."""

import logging
import os
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from hydra import compose
from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console, Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlhf.errors import ConfigError
from rlhf.files import FAILED, METRICS, SUMMARY, read_object, write_json
from rlhf.objectives import objectives_of, result
from rlhf.sweep import slurm
from rlhf.sweep.resolvers import folder_name
from rlhf.tracking.reading import printable, read_plan, read_summary, stepped_lines, try_object

log = logging.getLogger(__name__)
PLAN = "plan.json"
UNKNOWN_PACE = "; how long they take is known when one of this model and data has finished"
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


class SweepCallback(Callback):
    """Notes the plan when a sweep starts; says how it went and makes the report when it ends."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Write `plan.json` into the sweep's folder, once it is clear that its jobs have somewhere to run."""
        folder, launcher = Path(config.hydra.sweep.dir), config.hydra.launcher
        self.described: dict[str, Mapping[str, Any]] = {}
        if config.dry_run:
            return
        if on_slurm(launcher):
            try:
                for trainer in _trainers(config):
                    slurm.check_tasks(launcher, trainer)
                slurm.check(launcher.timeout_min, launcher.signal_delay_s)
            except ConfigError as error:  # Hydra makes a warning of any other exception of a callback
                print(f"rlhf: {error}", file=sys.stderr)
                raise SystemExit(2) from None
        folder.mkdir(parents=True, exist_ok=True)
        if is_search(config):  # it plans as it goes
            return
        runs = planned(config)
        jobs = min(len(runs), launcher.array_parallelism) if on_slurm(launcher) else parallel_jobs(launcher)
        write_json(folder / PLAN, {"runs": runs, "jobs": jobs})

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Of a dry run, keep what the job would do."""
        if config.dry_run and job_return.status == JobStatus.COMPLETED and isinstance(job_return.return_value, dict):
            self.described[Path(job_return.return_value["folder"]).name] = job_return.return_value

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Sum up, make the report; a failed run makes the command fail, after the others are done."""
        folder = Path(config.hydra.sweep.dir)
        if config.dry_run:
            runs = [self._expected(run) for run in _states(folder, _intended(config, folder), None)]
            pace = _pace(folder, config)
            print(f"{counts(runs, parallel_jobs(config.hydra.launcher), pace)}{'' if pace else UNKNOWN_PACE}")
            return
        if not (folder / PLAN).exists():
            return
        runs = states(folder)
        Console().print(view(folder, runs))
        if any(run.state == "done" for run in runs) and config.stage.name == "ppo":
            _report(folder, config)
        if any(run.state == "failed" for run in runs):
            raise SystemExit(1)

    def _expected(self, run: State) -> State:
        """A run as the command would find it: what lies in its folder may be a run of another configuration."""
        found = self.described.get(run.folder.name)
        if found is None or (run.state == "done") == found["done"]:
            return run
        return replace(run, state="done" if found["done"] else "waiting", seconds=None)


def _report(folder: Path, config: DictConfig) -> None:
    from rlhf.report.cli import make_report, show_front
    from rlhf.report.publish import publish

    try:
        page = make_report([folder])
        show_front(folder)
        log.info("report: %s", page)
        publish(page, folder, config)
    except Exception:  # the runs are worth more than their picture: rlhf-report can be called again
        log.exception("the report could not be made; rlhf-report %s tries again", folder)


def planned(config: DictConfig) -> list[dict[str, Any]]:
    """Every job of the sweep: its folder's name and its overrides."""
    excluded = config.hydra.job.config.override_dirname.exclude_keys
    jobs: dict[str, list[str]] = {}
    for overrides in _expanded(config):
        folder, named = run_folder(config, overrides), naming(overrides, excluded)
        if jobs.setdefault(folder, named) != named:
            raise ConfigError(
                f"{' '.join(jobs[folder])} and {' '.join(named)} would share the folder {folder}; "
                "allowed: values that do not contain _key- as if another key followed"
            )
    return [{"folder": folder, "overrides": overrides} for folder, overrides in jobs.items()]


def _expanded(config: DictConfig) -> list[list[str]]:
    """The overrides of every job of the sweep, by Hydra's own expansion."""
    parser = OverridesParser.create()
    axes = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    batches = BasicSweeper.split_arguments(parser.parse_overrides([*axes, *config.hydra.overrides.task]), None)
    return batches[0]


def _trainers(config: DictConfig) -> list[DictConfig]:
    """The different trainers that the jobs of the sweep ask for."""
    if is_search(config):
        return [config.trainer]
    jobs = {tuple(item for item in job if item.lstrip("+~").startswith("trainer")): job for job in _expanded(config)}
    return [compose(config.hydra.job.config_name, job).trainer for job in jobs.values()]


def _intended(config: DictConfig, folder: Path) -> dict[str, Any]:
    """The plan of a dry run, which writes none; a search has the runs that it chose so far."""
    if not is_search(config):
        return {"runs": planned(config)}
    runs = read_object(folder / PLAN, runs=list)["runs"] if (folder / PLAN).exists() else []
    return {"runs": runs, "to_come": max(0, config.hydra.sweeper.n_trials - len(runs))}


def run_folder(config: DictConfig, overrides: list[str]) -> str:
    """The name of the folder, in the sweep's, of the job with these overrides."""
    how = config.hydra.job.config.override_dirname
    parsed = OverridesParser.create().parse_overrides(overrides)
    return folder_name(
        get_overrides_dirname(
            overrides=parsed, kv_sep=how.kv_sep, item_sep=how.item_sep, exclude_keys=list(how.exclude_keys)
        )
    )


def naming(overrides: Iterable[str], excluded: Iterable[str]) -> list[str]:
    """The overrides that tell one run from another."""
    return [override for override in overrides if override.lstrip("+~").partition("=")[0] not in set(excluded)]


def is_search(config: DictConfig) -> bool:
    """Whether this is `hydra/sweeper=search`."""
    return str(config.hydra.sweeper.get("_target_")).endswith("rlhf_search.Search")


def told(run: Path, config: DictConfig) -> float | list[float] | None:
    """What a sweeper is to be told of the run in a folder, by its summary."""
    if not (run / SUMMARY).exists():
        return None
    return result(read_object(run / SUMMARY, metrics=dict)["metrics"], objectives_of(config))


def parallel_jobs(launcher: DictConfig) -> int:
    """How many jobs a launcher runs at once on this machine."""
    jobs = int(launcher.get("n_jobs") or 1)
    return jobs if jobs > 0 else max(1, (os.cpu_count() or 1) + 1 + jobs)


def on_slurm(launcher: DictConfig) -> bool:
    """Whether this is `hydra/launcher=slurm`."""
    return str(launcher.get("_target_")).endswith("rlhf_slurm.SlurmLauncher")


def states(folder: Path, queue: Mapping[str, slurm.Queued] | None = None) -> list[State]:
    """How far every run of the plan is; `queue` is what SLURM says of its jobs, where one asked."""
    return _states(folder, read_object(folder / PLAN, runs=list), queue)


def _states(folder: Path, plan: Mapping[str, Any], queue: Mapping[str, slurm.Queued] | None) -> list[State]:
    runs = [_state(folder / run["folder"], tuple(run["overrides"]), queue) for run in plan["runs"]]
    return runs + [State(folder, (), "waiting")] * plan.get("to_come", 0)  # trials of a search not chosen yet


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
        summary, fault = read_summary(folder / SUMMARY)
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


def jobs_of(plan: Path) -> int:
    """How many jobs the sweep runs at once."""
    return int(read_object(plan).get("jobs", 1))


def seconds_left(runs: list[State], jobs: int, pace: float | None = None) -> float | None:
    """What the missing runs will take at the pace of the finished ones, else at `pace` seconds each; None without."""
    paces = [run.seconds for run in runs if run.seconds and run.seconds > 0] or ([pace] if pace else [])
    missing = sum(run.state in ("running", "begun", "waiting") for run in runs)
    return sum(paces) / len(paces) * missing / jobs if paces else None


def _pace(folder: Path, config: DictConfig) -> float | None:
    """Seconds that a run will take, by finished runs of the same model and data anywhere in the outputs."""
    found = []
    for path in folder.parent.glob(f"*/*/{SUMMARY}"):
        summary, _ = read_summary(path)
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


def view(folder: Path, runs: list[State]) -> Group:
    """A sweep on the terminal: a bar, a line, and what failed or is under way."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for run in runs:
        if run.state in ("running", "begun", "failed") or run.reason:
            left = f"{timedelta(seconds=round(run.left))} left" if run.left is not None else ""
            colour = "red" if run.state == "failed" else "cyan"
            table.add_row(Text(run.state, colour), run.folder.name, f"step {run.step}", run.node, left, run.reason)
    done = sum(run.state == "done" for run in runs)
    return Group(
        Text(str(folder), style="bold"),
        ProgressBar(len(runs), done, width=60),
        counts(runs, jobs_of(folder / PLAN)),
        table,
    )


def status() -> None:
    """`rlhf-status FOLDER [--watch]`: how far a sweep is."""
    import argparse

    from rlhf.errors.explaining import in_a_sentence

    parser = argparse.ArgumentParser(prog="rlhf-status", description="How far a sweep is.")
    parser.add_argument("folder", type=Path, help="the sweep's folder, such as outputs/table1")
    parser.add_argument("--watch", action="store_true", help="stay and refresh every five seconds")
    arguments = parser.parse_args()
    if not (arguments.folder / PLAN).exists():
        parser.exit(2, f"rlhf-status: {arguments.folder} holds no {PLAN}: it is not the folder of a sweep\n")
    _, fault = read_plan(arguments.folder / PLAN)
    if fault:
        parser.exit(2, f"rlhf-status: {arguments.folder}: {fault}\n")
    printable(sys.stdout)
    with in_a_sentence(parser.prog):
        _show(arguments.folder, arguments.watch)


def _show(folder: Path, watch: bool) -> None:
    from rich.live import Live

    console = Console()
    if not watch:
        console.print(view(folder, states(folder, queue(folder))))
        return
    with Live(console=console, refresh_per_second=1) as live:
        while True:
            runs = states(folder, queue(folder))
            live.update(view(folder, runs))
            if all(run.state in ("done", "failed") for run in runs):
                return
            time.sleep(5)
