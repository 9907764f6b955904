"""The `rlhf` command: compose, check, run, summarise.

Exit codes:
    0    done
    1    a failure of the machine, such as a full disk (one sentence), or a bug of ours (a traceback)
    2    a configuration, data set or model that cannot be used; one sentence says why
    3    stopped by a guard (conf/guards); failed.json says why
    75   stopped by a signal, or because an endpoint cannot be reached; the same command continues
    130  interrupted at once; before anything is trained there is nothing to save, and SIGTERM gives 143
"""

import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from rlhf import import_from_here, reference, root
from rlhf.distributed.cores import threads
from rlhf.distributed.rank import is_first_process
from rlhf.errors import (
    FAILURE,
    INTERRUPTED,
    MISTAKE,
    STOPPED,
    ConfigError,
    GuardStop,
    Interrupted,
    WorkerFailed,
)
from rlhf.errors.explaining import exit_with_sentence, explain, one_sentence_errors
from rlhf.errors.machine import machine_failure
from rlhf.errors.users_code import failure_in_users_code
from rlhf.files import FAILED, PLAN, SUMMARY, tidy, write_json
from rlhf.objectives import objectives_of, result
from rlhf.pipeline import earlier
from rlhf.pipeline.quiet import quieten
from rlhf.report.terminal import show_plan, show_results
from rlhf.sweep import live
from rlhf.sweep.plan import distinctive_overrides, on_slurm, parallel_jobs, planned_parallelism
from rlhf.sweep.states import names, progress_line, states
from rlhf.tracking import evaluations
from rlhf.tracking.run_folder import HYDRA, begin, hold_log, open_log, remove_empty

if TYPE_CHECKING:
    from rlhf.pipeline.plan import Plan

log = logging.getLogger(__name__)
Result = float | list[float] | dict[str, Any] | None


@hydra.main(version_base="1.3", config_path=str(root() / "conf"), config_name="config")
def app(config: DictConfig) -> Result:
    """Do one job; returns what a sweeper optimises: the final values of `objectives`, or else the win rate.

    In a dry run of a sweep it returns what the job would do.
    """
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    sweeping = hydra_config.mode == RunMode.MULTIRUN
    if not config.dry_run:
        (folder / FAILED).unlink(missing_ok=True)
    try:
        return attempt(config, folder, sweeping)
    finally:
        if (folder / HYDRA).exists() and not config.dry_run:  # it has begun, now or earlier
            open_log(folder)
        remove_empty(folder)


def attempt(config: DictConfig, folder: Path, sweeping: bool) -> Result:
    """Do a job. A failure becomes one sentence and an exit code, or in a sweep a note in the run's folder."""
    hold_log()
    try:
        return job(config, folder, sweeping)
    except Interrupted as stopped:
        if is_first_process():
            print(f"rlhf: {stopped}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        # the processes of the run have reported their failure; without a note there was a crash, noted below
        if isinstance(error, WorkerFailed) and ((folder / FAILED).exists() or not sweeping):
            if sweeping:
                return None
            raise SystemExit(error.code if error.code > 0 else FAILURE) from None
        if not is_first_process() and explain(error):  # all processes fail alike, and the first one reports it
            raise SystemExit(STOPPED if isinstance(error, GuardStop) else MISTAKE) from None
        theirs = (folder / HYDRA).exists() and failure_in_users_code(error)  # who needs the traceback
        if (sweeping or isinstance(error, GuardStop) or theirs) and not config.dry_run:
            # the reason stays with the run, and a sweep goes on to its next run
            reason = explain(error) or machine_failure(error) or f"{type(error).__name__}: {error}".partition("\n")[0]
            write_json(folder / FAILED, {"error": reason, "traceback": traceback.format_exc()})
            open_log(folder)
        if sweeping and not config.dry_run:
            log.error("FAILED %s: %s", folder.name, reason)
            return None
        if sweeping:  # a dry run names the first run that would be refused
            print(f"refused  {' '.join(_overrides())}")
        exit_with_sentence("rlhf", error)  # here, or Hydra would add its own account of the error
        raise


def job(config: DictConfig, folder: Path, sweeping: bool, bars: bool = True) -> Result:
    """Check one composed configuration, do its run, with `bars` that show its progress, and show the results."""
    # imported here so that completion, --help and composition errors do not wait for torch
    from rlhf.distributed import processes
    from rlhf.pipeline import cache
    from rlhf.pipeline.checks import check
    from rlhf.pipeline.config import data_source, settings_of
    from rlhf.pipeline.plan import Plan
    from rlhf.pipeline.preflight import describe
    from rlhf.pipeline.rows import read_if_missing

    quieten()
    launcher, workers = HydraConfig.get().launcher, processes.local_world_size(config.trainer)
    _share_cores(parallel_jobs(launcher) if sweeping else 1, workers)
    if not sweeping and on_slurm(launcher):
        raise ConfigError("hydra/launcher=slurm submits sweeps: rlhf -m …; without -m the run would be on this machine")
    overrides = _overrides()
    if config.stage.name == "evaluate" and config.policy is not None:
        return _evaluate_policy(config, folder, overrides, workers, sweeping)
    # 1. Check everything that can be checked before a model is loaded.
    settings, objectives = settings_of(config), objectives_of(config)
    source = data_source(config)
    check(config, settings, source)
    plan = Plan(config, settings, source, folder, overrides)
    if config.dry_run:
        described = describe(plan, read_if_missing(plan), timed=not sweeping)
        show_plan(described, overrides, sweeping)
        return described
    # 2. Do the run, in this process or in several.
    if workers > 1 and processes.cluster_environment() is None:
        summary = _launch(plan, workers)
    else:
        with processes.process_group(), cache.locked(folder / ".lock", f"another process works in {folder}"):
            summary = _run_or_reuse(plan, config.resume, parallel_jobs(launcher), progress=bars and not sweeping)
    # 3. Show the results, once.
    if not is_first_process() or processes.LAUNCHER_PID in os.environ:  # the process that started this one shows them
        return None
    return _shown(summary, folder, sweeping, objectives)


def _overrides() -> list[str]:
    """The overrides of this job that distinguish its results."""
    given, excluded = HydraConfig.get().overrides.task, HydraConfig.get().job.config.override_dirname.exclude_keys
    return distinctive_overrides(given, excluded)


def _shown(summary: dict[str, Any], folder: Path, sweeping: bool, objectives: Mapping[str, str]) -> Result:
    """Show the results, or in a sweep how far it is; returns what a sweeper optimises."""
    if sweeping:
        intended, name, line = folder.parent / PLAN, folder.name, "done"
        if intended.exists():
            runs = states(folder.parent)
            name = names(runs).get(folder, name)
            line = progress_line(runs, planned_parallelism(intended))
        log.info("%s: %s", name, line)
    else:
        show_results(summary, folder)
    return result(summary["metrics"], objectives)


def _evaluate_policy(config: DictConfig, folder: Path, overrides: list[str], workers: int, sweeping: bool) -> Result:
    """Measure the policy that `config.policy` names (stage=evaluate), and show the results."""
    from rlhf.finished.evaluate import evaluate
    from rlhf.pipeline import cache

    if workers > 1:
        raise ConfigError(f"trainer.devices={workers}: policy={config.policy} is measured by one process; allowed: 1")
    given, objectives = HydraConfig.get().overrides.task, objectives_of(config)
    if config.dry_run:
        described = evaluate(config, folder, given, overrides)
        show_plan(described, overrides, sweeping)
        return described
    with cache.locked(folder / ".lock", f"another process works in {folder}"):
        summary = evaluate(config, folder, given, overrides)
    return _shown(summary, folder, sweeping, objectives)


def _run_or_reuse(plan: "Plan", resume: str, jobs: int, progress: bool) -> dict[str, Any]:
    """The summary of the run: read if it is finished, taken over from an equal run, or made now.

    `jobs` run at once on this machine and share its memory.
    """
    from rlhf.distributed import collectives
    from rlhf.pipeline import cache, measuring
    from rlhf.pipeline.preflight import check_memory, keep_budget, settle_budget
    from rlhf.pipeline.rows import announce_rows
    from rlhf.pipeline.run import Run

    folder = plan.folder
    found = collectives.on_rank_zero(plan.finished) if resume != "never" else None
    # 1. See that the run fits before anything in the folder is touched.
    if found is None:
        settle_budget(plan, fresh=resume == "never", jobs=jobs)
        check_memory(plan)
        collectives.on_rank_zero(lambda: announce_rows(plan))
    # 2. The folder may hold a run of another configuration.
    noted = collectives.on_rank_zero(lambda: plan.noted)
    complete = (folder / SUMMARY).exists() and earlier.identity_of(folder) in (plan.identity, noted)
    collectives.on_rank_zero(lambda: _make_room(plan, resume, noted))
    # 3. Reuse what is finished, or run.
    collectives.on_rank_zero(lambda: begin(folder, plan.config, complete))
    open_log(folder)
    if found is None:
        collectives.on_rank_zero(lambda: measuring.begin(plan))
        collectives.on_rank_zero(lambda: keep_budget(plan))
        return Run(plan, progress).run()
    if found in (folder, earlier.place(folder, noted)):
        collectives.on_rank_zero(lambda: cache.register_run(plan.outputs, plan.identity, folder))
        log.info("%s is finished already; resume=never would start over", folder)
    else:
        log.info("%s is the same run as %s and taken over from it", folder.name, found)
        collectives.on_rank_zero(lambda: measuring.take_over(plan, found))
    collectives.on_rank_zero(lambda: measuring.warn_of_what_is_missing(plan, folder))
    # 4. Measure it as asked, without a training step.
    todo = collectives.on_rank_zero(lambda: measuring.unmeasured(plan, folder))
    if todo:
        settle_budget(plan, jobs=jobs)
        place = evaluations.place(folder, plan.evaluation)
        log.info("%s is measured without training, at step %s: %s", folder.name, ", ".join(map(str, todo)), place)
        Run(plan, progress).measure(todo, place)
    collectives.on_rank_zero(lambda: evaluations.show(folder, plan.evaluation))
    return evaluations.shown_summary(folder) or {}


def _make_room(plan: "Plan", resume: str, noted: str) -> None:
    """Move a run of another configuration aside, or bring this one back from there (`rlhf.pipeline.earlier`).

    `noted` is the identity under which this one is noted there.
    """
    tidy(plan.folder)
    present = earlier.identity_of(plan.folder)
    known = present in (None, noted) or earlier.place(plan.folder, noted).is_dir()
    if resume == "must" and not known:
        raise ConfigError(f"resume=must, but {plan.folder} holds a run of another configuration; allowed: resume=auto")
    earlier.settle(plan.folder, noted, plan.outputs, resume == "never", plan.present)


def _launch(plan: "Plan", workers: int) -> dict[str, Any]:
    """Do the run in several processes of our own (`rlhf.worker`), which are given the composed configuration."""
    from rlhf.distributed import processes

    whole = {"hydra": OmegaConf.to_container(HydraConfig.get(), resolve=True, enum_to_str=True), **plan.plain}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        OmegaConf.save(whole, config)
        code = processes.launch(workers, config)
    if code == INTERRUPTED:
        raise Interrupted("stopped after saving; the same command continues")
    if code:
        raise WorkerFailed(code)
    return evaluations.shown_summary(plan.folder) or {}


def _share_cores(jobs: int, processes: int) -> None:
    """Limit the threads of each process of each job to its share of the cores: two threads on one core are slower.

    The last bits of a sum depend on the number of threads. A sweep's run has the bits of the same run alone if
    OMP_NUM_THREADS says how many threads both have. A run never has more threads than it would have alone.
    """
    import torch

    share = threads(jobs, processes)
    if share is not None:
        torch.set_num_threads(min(torch.get_num_threads(), share))


def main() -> None:
    """Entry point of `rlhf` and `python -m rlhf`."""
    # or Hydra would print its own, longer account of an error and exit with 1
    os.environ["HYDRA_FULL_ERROR"] = "1"
    import_from_here()
    logging.raiseExceptions = False  # a full disk must not print a traceback for every logged line
    if "dry_run=true" in sys.argv and {"-m", "--multirun"} & set(sys.argv):
        # list the jobs in order, from one process, without Hydra's lines on what it starts
        launching = ("hydra/launcher=", "hydra.launcher.", "cluster=")
        sys.argv = [word for word in sys.argv if not word.startswith(launching)]
        sys.argv += ["hydra/launcher=basic", "hydra.hydra_logging.root.level=WARNING"]
    with one_sentence_errors("rlhf"):
        told = reference.asked(sys.argv[1:])
        if told is not None:
            try:
                print(told, flush=True)
            except BrokenPipeError:  # `| head` has read enough; nothing is left to be flushed at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return
        with live.closing():
            app()
