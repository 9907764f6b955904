"""`hydra/launcher=slurm`: every run of a sweep is a job on a SLURM cluster. Hydra looks for launchers in this package.

submitit writes the batch script and unpickles the launcher in the job; hydra-submitit-launcher composes the
configuration there and runs it. This module adds what they lack: jobs run the code as it was submitted, save and
requeue themselves when their time is up, are not submitted twice, and the command ends even if a job was killed.
"""

import logging
import os
import shlex
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from rlhf.distributed import rank
from rlhf.errors import INTERRUPTED, ConfigError
from rlhf.files import FAILED, SUMMARY, write_json
from rlhf.sweep import plan, slurm, states
from rlhf.tracking.code import freeze

log = logging.getLogger(__name__)
POLL_SECONDS = 5
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class SlurmLauncher(Launcher):
    """Submits a sweep as a job array and waits for it. Every job unpickles a copy and calls it."""

    def __init__(self, **params: Any) -> None:
        # imported here, because Hydra imports this module even if the extra `slurm` is not installed
        from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher as Submitit

        self.inner = Submitit(**params)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `launch`."""
        self.inner.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    # -- on the login node -------------------------------------------------------------------------------------------

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit the jobs that are not queued already, and wait until all have left the queue.

        Returns:
            For every job, the values of `objectives` from its run's summary; None for a run without a summary.

        Raises:
            ConfigError: SLURM does not answer.
        """
        # 1. the folder of each job
        config = self.inner.config
        folder = Path(config.hydra.sweep.dir).resolve()
        numbered = {
            plan.run_folder(config, list(job)): (initial_job_idx + i, job) for i, job in enumerate(job_overrides)
        }
        runs = {folder / name: job for name, job in numbered.items()}
        # 2. jobs of an earlier command that are still queued
        known = {run: job for run in runs if (job := slurm.read_job(run).get("job"))}
        queued = slurm.squeue(known.values())
        if queued is None:
            raise ConfigError("squeue does not answer, so that jobs might be submitted twice: try again later")
        jobs = {run: job for run, job in known.items() if job in queued}
        if jobs:
            log.info("%d of %d jobs are still in the queue: waiting for them", len(jobs), len(runs))
        # 3. the others, and the end of all
        jobs |= self._submit({run: job for run, job in runs.items() if run not in jobs}, folder)
        try:
            self._wait(jobs, folder)
        except KeyboardInterrupt:
            names = " ".join(sorted({job.partition("_")[0] for job in jobs.values()}))
            log.warning("the jobs go on; the same command waits for them again, `scancel %s` ends them", names)
            raise
        values = [plan.objective_values(folder / plan.run_folder(config, list(job)), config) for job in job_overrides]
        return [
            JobReturn(overrides=list(job), status=JobStatus.COMPLETED, _return_value=value)
            for job, value in zip(job_overrides, values, strict=True)
        ]

    def _submit(self, runs: dict[Path, tuple[int, Sequence[str]]], folder: Path) -> dict[Path, str]:
        """Submit a job array, one task per run (folder → job number and overrides); returns folder → job name."""
        import submitit
        from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

        if not runs:
            return {}
        # 1. the options of sbatch
        code = self._freeze_code(folder)
        params = dict(self.inner.params)
        executor = submitit.AutoExecutor(folder=params.pop("submitit_folder"), cluster="slurm")
        del params["max_num_timeout"]  # used in __call__: submitit itself would requeue a job in the middle of a step
        params["setup"] = [*(params["setup"] or []), *_environment(code)]
        delay = params["signal_delay_s"]
        params["additional_parameters"] = {
            "requeue": True,
            "signal": f"USR1@{delay}",
            **params["additional_parameters"],
        }
        shared = set(OmegaConf.structured(BaseQueueConf))
        executor.update_parameters(**{key if key in shared else f"slurm_{key}": value for key, value in params.items()})
        # 2. submission, with the state of Hydra's singletons that each job restores
        numbers, overrides = zip(*runs.values(), strict=True)
        state = Singleton.get_state()
        submitted = executor.map_array(self, [list(job) for job in overrides], numbers, [state] * len(runs))
        jobs = {run: job.job_id for run, job in zip(runs, submitted, strict=True)}
        # 3. what rlhf-status and a second command read
        for (run, name), job in zip(jobs.items(), submitted, strict=True):
            slurm.record_submission(run, name, job.paths.stdout)
            (run / FAILED).unlink(missing_ok=True)
        log.info(
            "submitted %s: the code is %s, rlhf-status %s says how far it is", ", ".join(jobs.values()), code, folder
        )
        return jobs

    def _freeze_code(self, folder: Path) -> Path:
        """Copy code and `conf/` into the sweep's folder, and let jobs compose from that copy; returns its path.

        A job composes its configuration only when it starts, which may be days after its submission.
        """
        from hydra._internal.config_loader_impl import ConfigLoaderImpl

        code = freeze(folder / ".code")
        context = self.inner.hydra_context
        search_path = context.config_loader.get_search_path()
        for element in search_path.get_path():
            if element.provider == "main":
                element.path = str(code / "conf")
        self.inner.hydra_context = HydraContext(ConfigLoaderImpl(search_path), context.callbacks)
        return code

    def _wait(self, jobs: dict[Path, str], folder: Path) -> None:
        """Wait until no job is in the queue, and log progress whenever it changes."""
        last_line = ""
        while jobs:
            queued = slurm.squeue(jobs.values())
            for run in [run for run, job in jobs.items() if queued is not None and job not in queued]:
                _record_end(run, jobs.pop(run))
            runs = states.states(folder, queued)
            if (line := states.progress_line(runs, plan.planned_parallelism(folder / plan.PLAN))) != last_line:
                log.info(line)
            last_line = line
            time.sleep(POLL_SECONDS if jobs else 0)

    # -- inside of a job ---------------------------------------------------------------------------------------------

    def __call__(self, overrides: list[str], number: int, state: dict[type, Singleton]) -> JobReturn:
        """Run one job; if SLURM signals that its time is up or that it is preempted, save and requeue it.

        Raises:
            SystemExit: with code INTERRUPTED after a signal.
        """
        for number_of_signal in SIGNALS:
            # replaces submitit's handlers; while a stage trains, `rlhf.pipeline.interruption` has its own
            signal.signal(number_of_signal, _exit_interrupted)
        if slurm.restart_count():
            # resume=never is for the first start only: a requeued job must not begin again
            overrides = ["resume=auto" if override == "resume=never" else override for override in overrides]
        if rank.is_first_process():
            folder = Path(self.inner.config.hydra.sweep.dir).resolve()
            slurm.record_start(folder / plan.run_folder(self.inner.config, overrides))
        try:
            return self.inner(overrides, "hydra.sweep.dir", number, f"job_id_for_{number}", state)
        except SystemExit as stopped:
            for number_of_signal in SIGNALS:  # SLURM sends more while it ends the job; requeueing must not be cut off
                signal.signal(number_of_signal, signal.SIG_IGN)
            if stopped.code == INTERRUPTED and rank.is_first_process():
                slurm.requeue(self.inner.params["max_num_timeout"])
            raise


def _environment(code: Path) -> list[str]:
    """Shell lines that put the frozen code first on PYTHONPATH and the current folder (the user's modules) last."""
    path = f"{shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}:{shlex.quote(os.getcwd())}"
    return ["export PYTHONSAFEPATH=1", f"export PYTHONPATH={path}"]


def _exit_interrupted(number: int, frame: FrameType | None) -> None:
    """Signal handler outside of training, where there is nothing to save: the next start repeats the work."""
    log.warning("%s: exiting", signal.Signals(number).name)
    raise SystemExit(INTERRUPTED)


def _record_end(run: Path, job: str) -> None:
    """Write a failed.json with SLURM's reason for a run that wrote neither a summary nor a failed.json itself."""
    if not any((run / name).exists() for name in (SUMMARY, FAILED)):
        reason = slurm.end_reason(job) or f"job {job} left the queue without a result"
        write_json(run / FAILED, {"error": f"{reason}; the same command continues", "traceback": ""})
        log.error("FAILED %s: %s", run.name, reason)
