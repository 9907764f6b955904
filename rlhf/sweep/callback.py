"""What a sweep intends, how far it is, and what happens at its end. Imported by Hydra's callback: no torch here."""

import logging
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console

from rlhf.errors import ConfigError
from rlhf.files import write_json
from rlhf.sweep import slurm
from rlhf.sweep.plan import PLAN, intended, is_search, on_slurm, parallel_jobs, planned, trainers
from rlhf.sweep.states import State, counts, pace_of, states, states_of
from rlhf.sweep.status import view

log = logging.getLogger(__name__)
UNKNOWN_PACE = "; how long they take is known when one of this model and data has finished"


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
                for trainer in trainers(config):
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
            runs = [self._expected(run) for run in states_of(folder, intended(config, folder), None)]
            pace = pace_of(folder, config)
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
    from rlhf.report.log_report import log_report

    try:
        page = make_report([folder])
        show_front(folder)
        log.info("report: %s", page)
        log_report(page, folder, config)
    except Exception:  # the runs are worth more than their picture: rlhf-report can be called again
        log.exception("the report could not be made; rlhf-report %s tries again", folder)
