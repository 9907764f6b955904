"""`hydra/launcher=slurm`: each job of a sweep on a SLURM cluster. Hydra finds launchers in this namespace only.

submitit writes the batch script and carries the job over; hydra-submitit-launcher composes and runs it there. What
stands here is what they leave out: the code as submitted, runs that save and return to the queue, jobs that are queued
already, and an end that does not need every job to have had one.
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
    """Submits a sweep as a job array and waits for it; pickled into every job, where it is called."""

    def __init__(self, **params: Any) -> None:
        # imported here, for Hydra imports this module whether or not the extra is installed
        from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher as Submitit

        self.inner = Submitit(**params)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's; before `launch`."""
        self.inner.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    # -- on the login node -------------------------------------------------------------------------------------------

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit what is not in the queue already, and wait until all have left it, however they ended."""
        config = self.inner.config
        folder = Path(config.hydra.sweep.dir).resolve()
        numbered = {
            plan.run_folder(config, list(job)): (initial_job_idx + i, job) for i, job in enumerate(job_overrides)
        }
        runs = {folder / name: job for name, job in numbered.items()}
        known = {run: job for run in runs if (job := slurm.job_of(run).get("job"))}
        queued = slurm.queue(known.values())
        if queued is None:
            raise ConfigError("squeue does not answer, so that jobs might be submitted twice: try again later")
        jobs = {run: job for run, job in known.items() if job in queued}
        if jobs:
            log.info("%d of %d jobs are in the queue, as they were submitted: waiting for them", len(jobs), len(runs))
        jobs |= self._submit({run: job for run, job in runs.items() if run not in jobs}, folder)
        try:
            self._wait(jobs, folder)
        except KeyboardInterrupt:
            names = " ".join(sorted({job.partition("_")[0] for job in jobs.values()}))
            log.warning("the jobs go on; the same command waits for them again, `scancel %s` ends them", names)
            raise
        told = [plan.told(folder / plan.run_folder(config, list(job)), config) for job in job_overrides]
        return [
            JobReturn(overrides=list(job), status=JobStatus.COMPLETED, _return_value=value)
            for job, value in zip(job_overrides, told, strict=True)
        ]

    def _submit(self, runs: dict[Path, tuple[int, Sequence[str]]], folder: Path) -> dict[Path, str]:
        import submitit
        from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

        if not runs:
            return {}
        code = self._pin(folder)
        params = dict(self.inner.params)
        executor = submitit.AutoExecutor(folder=params.pop("submitit_folder"), cluster="slurm")
        del params["max_num_timeout"]  # ours, in __call__: submitit would put a job back in the middle of a step
        params["setup"] = [*(params["setup"] or []), *_environment(code)]
        delay = params["signal_delay_s"]
        params["additional_parameters"] = {
            "requeue": True,
            "signal": f"USR1@{delay}",
            **params["additional_parameters"],
        }
        shared = set(OmegaConf.structured(BaseQueueConf))
        executor.update_parameters(**{key if key in shared else f"slurm_{key}": value for key, value in params.items()})
        numbers, overrides = zip(*runs.values(), strict=True)
        state = Singleton.get_state()
        submitted = executor.map_array(self, [list(job) for job in overrides], numbers, [state] * len(runs))
        jobs = {run: job.job_id for run, job in zip(runs, submitted, strict=True)}
        for (run, name), job in zip(jobs.items(), submitted, strict=True):
            slurm.note_submitted(run, name, job.paths.stdout)
            (run / FAILED).unlink(missing_ok=True)
        log.info(
            "submitted %s: the code is %s, rlhf-status %s says how far it is", ", ".join(jobs.values()), code, folder
        )
        return jobs

    def _pin(self, folder: Path) -> Path:
        """Freeze the code, and let jobs compose from the frozen configuration: they compose when they start."""
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
        """Until no job is in the queue; one that left it without a word of its own gets SLURM's."""
        before = ""
        while jobs:
            queued = slurm.queue(jobs.values())
            for run in [run for run, job in jobs.items() if queued is not None and job not in queued]:
                _explain_end(run, jobs.pop(run))
            runs = states.states(folder, queued)
            if (line := states.counts(runs, plan.jobs_of(folder / plan.PLAN))) != before:
                log.info(line)
            before = line
            time.sleep(POLL_SECONDS if jobs else 0)

    # -- inside of a job ---------------------------------------------------------------------------------------------

    def __call__(self, overrides: list[str], number: int, state: dict[type, Singleton]) -> JobReturn:
        """Run one job; stopped by a signal (the time limit's, or a preemption's) it saves and returns to the queue."""
        for each in SIGNALS:
            signal.signal(each, _leave)  # in place of submitit's; while a stage trains its own handlers stand before
        if slurm.restarts():
            # starting over was meant for the first start
            overrides = ["resume=auto" if override == "resume=never" else override for override in overrides]
        if rank.is_first_process():
            folder = Path(self.inner.config.hydra.sweep.dir).resolve()
            slurm.note_started(folder / plan.run_folder(self.inner.config, overrides))
        try:
            return self.inner(overrides, "hydra.sweep.dir", number, f"job_id_for_{number}", state)
        except SystemExit as stopped:
            for each in SIGNALS:  # those that follow, as SLURM ends the job, have nothing left to stop
                signal.signal(each, signal.SIG_IGN)
            if stopped.code == INTERRUPTED and rank.is_first_process():
                slurm.put_back(self.inner.params["max_num_timeout"])
            raise


def _environment(code: Path) -> list[str]:
    """Shell lines that put the frozen code first, and the user's own modules, in the current folder, last."""
    path = f"{shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}:{shlex.quote(os.getcwd())}"
    return ["export PYTHONSAFEPATH=1", f"export PYTHONPATH={path}"]


def _leave(number: int, frame: FrameType | None) -> None:
    """Outside of training there is nothing to save: what was begun is begun again."""
    log.warning("%s: leaving", signal.Signals(number).name)
    raise SystemExit(INTERRUPTED)


def _explain_end(run: Path, job: str) -> None:
    """Leave SLURM's reason with a run that has neither a summary nor a reason."""
    if not any((run / name).exists() for name in (SUMMARY, FAILED)):
        reason = slurm.fate(job) or f"job {job} left the queue without a result"
        write_json(run / FAILED, {"error": f"{reason}; the same command continues", "traceback": ""})
        log.error("FAILED %s: %s", run.name, reason)
