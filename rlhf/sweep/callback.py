"""Hydra's callback at the start and the end of a sweep. It runs on the command line, so torch is not imported here."""

import logging
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write
from rich.console import Console

from rlhf.errors import FAILURE, MISTAKE, ConfigError, UserError
from rlhf.errors.explaining import exit_with_sentence
from rlhf.files import PLAN, write_json
from rlhf.pipeline.values import check_groups, values_of
from rlhf.policy_settings import METHODS
from rlhf.sweep import live, slurm
from rlhf.sweep.plan import (
    configs_of_all_values,
    earlier_runs,
    is_search,
    on_slurm,
    parallel_jobs,
    plan_of_dry_run,
    planned_runs,
    trainer_configs,
    without_hydra,
)
from rlhf.sweep.states import RunState, expected_seconds, progress_line, states, states_of_plan
from rlhf.sweep.status import view
from rlhf.tracking.run_folder import note_present

log = logging.getLogger(__name__)
UNKNOWN_DURATION = "; how long they take is known when one of this model and data has finished"


class SweepCallback(Callback):
    """Checks values before a job starts.

    Writes the plan when a sweep starts; prints how it went and makes the report when it ends.
    """

    def __init__(self, live: bool = True) -> None:
        self.live = live  # False: log lines instead of a table, as where there is no terminal
        self.described = dict[str, Mapping[str, Any]]()  # in a dry run, what each job would do, by its folder

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check values before Hydra makes a folder for the run.

        Raises:
            SystemExit: one of them is not allowed.
        """
        note_present(Path(config.hydra.run.dir))
        _check([without_hydra(config)])

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check all values, and that SLURM can run the jobs, if it shall; write `plan.json` into the sweep's folder.

        Raises:
            SystemExit: a value is not allowed, there is no SLURM, or its options do not fit the trainer.
        """
        folder, launcher = Path(config.hydra.sweep.dir), config.hydra.launcher
        self.folder = folder
        note_present(folder)
        _check([without_hydra(config)] if is_search(config) else configs_of_all_values(config))
        if config.dry_run:
            with read_write(config.hydra):  # where Hydra writes multirun.yaml
                self.scratch = tempfile.TemporaryDirectory()  # gone with this process
                config.hydra.sweep.dir = self.scratch.name
            return
        if on_slurm(launcher):
            try:
                for trainer in trainer_configs(config):
                    slurm.check_tasks(launcher, trainer)
                slurm.check_cluster(launcher.timeout_min, launcher.signal_delay_s)
            except ConfigError as error:  # Hydra turns other exceptions of a callback into warnings
                print(f"rlhf: {error}", file=sys.stderr)
                raise SystemExit(MISTAKE) from None
        folder.mkdir(parents=True, exist_ok=True)
        if is_search(config):  # plans as it goes: `rlhf.sweep.search`
            self._show(folder, launcher)
            return
        runs = planned_runs(config)
        jobs = min(len(runs), launcher.array_parallelism) if on_slurm(launcher) else parallel_jobs(launcher)
        write_json(folder / PLAN, {"runs": runs, "jobs": jobs, "earlier": earlier_runs(folder, runs)})
        self._show(folder, launcher)

    def _show(self, folder: Path, launcher: DictConfig) -> None:
        """Show how far the sweep is, until it ends; on SLURM, `rlhf-status` asks the queue."""
        if on_slurm(launcher):
            return
        terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        live.Display(folder, live=self.live and terminal)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """In a dry run, keep the description that the job returned."""
        if config.dry_run and job_return.status == JobStatus.COMPLETED and isinstance(job_return.return_value, dict):
            self.described[Path(job_return.return_value["folder"]).name] = job_return.return_value

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the state of all runs and make the report; after a dry run, print what it would do.

        Raises:
            SystemExit: a run has failed. The others are done by then.
        """
        folder = self.folder
        if config.dry_run:
            runs = [self._described_state(run) for run in states_of_plan(folder, plan_of_dry_run(config, folder), None)]
            seconds = expected_seconds(folder, config)
            line = progress_line(runs, parallel_jobs(config.hydra.launcher), seconds)
            print(f"{line}{'' if seconds else UNKNOWN_DURATION}")
            return
        live.close()
        if not (folder / PLAN).exists():
            return
        runs = states(folder)
        Console().print(view(folder, runs))
        if any(run.state == "done" for run in runs) and config.stage.name in (*METHODS, "evaluate"):
            _report(folder, config)
        if any(run.state == "failed" for run in runs):
            raise SystemExit(FAILURE)

    def _described_state(self, run: RunState) -> RunState:
        """The state that the job's own description gives: files in a folder may belong to another configuration."""
        found = self.described.get(run.folder.name)
        if found is None or (run.state == "done") == found["done"]:
            return run
        return replace(run, state="done" if found["done"] else "waiting", seconds=None)


def _check(configs: Iterable[DictConfig]) -> None:
    """Check groups, keys and values without torch; exit with one sentence at the first that is not allowed."""
    from rlhf.pipeline.hub import check_hub  # the first time, this takes as long as all the rest

    try:
        for config in configs:
            check_groups(config)
            values_of(config)
            check_hub(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
    except UserError as error:  # Hydra turns other exceptions of a callback into warnings
        exit_with_sentence("rlhf", error)


def _report(folder: Path, config: DictConfig) -> None:
    """Make and publish the sweep's report; a failure is logged only."""
    # imported here, since most commands make no report
    from rlhf.report.cli import show_report
    from rlhf.report.log_report import log_report

    try:
        log_report(show_report([folder]), folder, config)
    except Exception:  # the runs themselves are safe, and rlhf-report can be called again
        log.exception("the report could not be made; rlhf-report %s tries again", folder)
