"""The `rlhf` command: compose, check, run, summarise.

Exit codes: 0 done, 2 a configuration, data set or model that cannot be used (one sentence says why), 3 stopped by a
guard (conf/guards; failed.json says why), 75 stopped by a signal after saving (the same command continues), 130
interrupted at once, 1 anything else: a failure of the machine, such as a full disk, in one sentence too, and our own
mistakes with a traceback.
"""

import logging
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from rlhf import root
from rlhf.distributed.rank import is_first_process
from rlhf.errors import FAILURE, INTERRUPTED, KEYBOARD, ConfigError, GuardStop, Interrupted, WorkerFailed
from rlhf.errors.explaining import exit_with_sentence, explain
from rlhf.errors.machine import machine_failure
from rlhf.files import FAILED, SUMMARY, read_json, tidy, write_json
from rlhf.objectives import objectives_of, result
from rlhf.pipeline import earlier
from rlhf.pipeline.quiet import quieten
from rlhf.sweep.plan import PLAN, distinctive_overrides, on_slurm, parallel_jobs, planned_parallelism
from rlhf.sweep.states import progress_line, states

if TYPE_CHECKING:
    from rlhf.pipeline.run import Run

log = logging.getLogger(__name__)
Result = float | list[float] | dict[str, Any] | None
ROWS = {
    "eval/win_rate": ("win rate against the reference (%)", 100),
    "eval/win_rate_se": ("  its standard error", 100),
    "eval/length_adjusted_win_rate": ("  length-adjusted (%)", 100),
    "eval/length_adjusted_win_rate_se": ("  its standard error", 100),
    "eval/length_controlled_win_rate": ("  length-controlled (%)", 100),
    "eval/length_controlled_win_rate_se": ("  its standard error", 100),
    "eval/reward": ("learned reward", 1),
    "eval/gold_utility": ("gold utility", 1),
    "eval/true_kl": ("true KL from SFT (nats per token)", 1),
    "eval/response_tokens": ("response length (tokens)", 1),
    "eval/factual_precision": ("factual precision (%)", 100),
    "eval/facts_per_response": ("facts per response", 1),
    "eval/factscore": ("FActScore (%)", 100),
    "eval/responding_ratio": ("responses that do not abstain (%)", 100),
}


@hydra.main(version_base="1.3", config_path=str(root() / "conf"), config_name="config")
def app(config: DictConfig) -> Result:
    """One job: returns what a sweeper optimises, the final values of `objectives` or else the win rate.

    A dry run of a sweep returns what it would do instead.
    """
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    sweeping = hydra_config.mode == RunMode.MULTIRUN
    if not config.dry_run:
        (folder / FAILED).unlink(missing_ok=True)
    return attempt(config, folder, sweeping)


def attempt(config: DictConfig, folder: Path, sweeping: bool) -> Result:
    """`job`, its failure told as one sentence and an exit code, or, in a sweep, noted in the run's folder."""
    try:
        return job(config, folder, sweeping)
    except Interrupted as asked:
        if is_first_process():
            print(f"rlhf: {asked}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        if isinstance(error, WorkerFailed) and ((folder / FAILED).exists() or not sweeping):
            if sweeping:
                return None
            raise SystemExit(error.code if error.code > 0 else FAILURE) from None
        if not is_first_process() and explain(error):  # what all processes find, one tells
            raise SystemExit(FAILURE) from None
        if (sweeping or isinstance(error, GuardStop)) and not config.dry_run:
            # the reason stays with the run, and a sweep goes on to the next
            reason = explain(error) or machine_failure(error) or f"{type(error).__name__}: {error}".partition("\n")[0]
            write_json(folder / FAILED, {"error": reason, "traceback": traceback.format_exc()})
        if sweeping and not config.dry_run:
            log.error("FAILED %s: %s", folder.name, reason)
            return None
        if not sweeping:  # leaving at once keeps Hydra from adding its own account
            exit_with_sentence("rlhf", error)
        raise


def job(config: DictConfig, folder: Path, sweeping: bool) -> Result:
    """Check, run, summarise one composed configuration."""
    # imported here so that completion, --help and composition errors do not wait for torch
    from rlhf.distributed import processes
    from rlhf.pipeline import cache
    from rlhf.pipeline.config import check, data_source, settings_of
    from rlhf.pipeline.preflight import describe
    from rlhf.pipeline.run import Run

    quieten()
    workers = processes.local_world_size(config.trainer)
    if sweeping:
        _share_cores(parallel_jobs(HydraConfig.get().launcher), workers)
    elif on_slurm(HydraConfig.get().launcher):
        raise ConfigError("hydra/launcher=slurm submits sweeps: rlhf -m …; without -m the run would be on this machine")
    settings, objectives = settings_of(config), objectives_of(config)
    source = data_source(config)
    check(config, settings, source)
    how = HydraConfig.get().job.config.override_dirname
    overrides = distinctive_overrides(HydraConfig.get().overrides.task, how.exclude_keys)
    run = Run(config, settings, source, folder, overrides, progress=not sweeping)
    if config.dry_run:
        described = describe(run)
        if not sweeping:
            print(OmegaConf.to_yaml(described))
            return None
        _list(described, overrides)
        return described
    if workers > 1 and processes.cluster_environment() is None:
        summary = _launch(run, workers)
    else:
        with processes.process_group(), cache.locked(folder / ".lock", f"another process works in {folder}"):
            summary = _run_or_reuse(run, config.resume)
    if not is_first_process() or processes.LAUNCHER_PID in os.environ:  # who started us will say it
        return None
    if sweeping:
        plan = folder.parent / PLAN
        line = progress_line(states(folder.parent), planned_parallelism(plan)) if plan.exists() else "done"
        log.info("%s: %s", folder.name, line)
    else:
        show(summary, folder)
    return result(summary["metrics"], objectives)


def _run_or_reuse(run: "Run", resume: str) -> dict[str, Any]:
    """The run's summary: found, taken over, or made."""
    from rlhf.distributed import collectives
    from rlhf.pipeline import cache
    from rlhf.pipeline.preflight import check_memory, keep_budget, settle_budget

    folder = run.folder
    found = collectives.on_rank_zero(run.finished) if resume != "never" else None
    if found is None:
        if run.config.stage.name in ("ppo", "evaluate"):
            settle_budget(run, fresh=resume == "never", jobs=parallel_jobs(HydraConfig.get().launcher))
        if run.config.stage.name == "ppo":
            check_memory(run)
    collectives.on_rank_zero(lambda: _make_room(run, resume))
    if found in (folder, earlier.place(folder, run.identity)):
        collectives.on_rank_zero(lambda: cache.register_run(run.outputs, run.identity, folder))
        log.info("%s is finished already; resume=never would start over", folder)
        return read_json(folder / SUMMARY)
    if found is not None:
        log.info("%s is the same run as %s and taken over from it", folder.name, found)
        return collectives.on_rank_zero(lambda: cache.take_over(found, folder, run.plain, run.overrides))
    collectives.on_rank_zero(lambda: earlier.note(folder, run.identity, run.plain, run.overrides))
    collectives.on_rank_zero(lambda: keep_budget(run))
    return run.run()


def _make_room(run: "Run", resume: str) -> None:
    """Move a run of another configuration aside, or bring this one back from there; see `rlhf.pipeline.earlier`."""
    tidy(run.folder)
    present = earlier.identity_of(run.folder)
    known = present in (None, run.identity) or earlier.place(run.folder, run.identity).is_dir()
    if resume == "must" and not known:
        raise ConfigError(f"resume=must, but {run.folder} holds a run of another configuration; allowed: resume=auto")
    earlier.settle(run.folder, run.identity, run.outputs, resume == "never", run.present)


def _launch(run: "Run", workers: int) -> dict[str, Any]:
    """The same with several processes of our own (`rlhf.worker`), which are given the composed configuration."""
    from rlhf.distributed import processes

    whole = {"hydra": OmegaConf.to_container(HydraConfig.get(), resolve=True, enum_to_str=True), **run.plain}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        OmegaConf.save(whole, config)
        code = processes.launch(workers, config)
    if code == INTERRUPTED:
        raise Interrupted("stopped after saving; the same command continues")
    if code:
        raise WorkerFailed(code)
    return read_json(run.folder / SUMMARY)


def _share_cores(jobs: int, processes: int) -> None:
    """Give each process of each job its share of the cores at most: two threads on one core are slower than one.

    Another number of threads gives other last bits. So a sweep's run has as many as the same run by itself where
    OMP_NUM_THREADS says how many, or where it has the machine to itself, and never more.
    """
    import torch

    if processes == 1 and "OMP_NUM_THREADS" in os.environ:  # joblib's workers have it set to their share
        return
    cores = int(os.environ.get("SLURM_CPUS_ON_NODE", os.cpu_count() or 1))
    torch.set_num_threads(min(torch.get_num_threads(), max(1, cores // (jobs * processes))))


def _list(description: dict[str, Any], overrides: list[str]) -> None:
    step = description["step"]
    state = "done   " if description["done"] else f"step {step:<3}" if step else "missing"
    same = f"  (= {description['same_as']})" if description["same_as"] else ""
    memory = (
        f"  {description['memory'].partition(' (')[0]}" if description["memory"] and not description["done"] else ""
    )
    print(f"{state}  {' '.join(overrides)}{memory}{same}")
    if description["moves_aside"]:
        print(f"         {description['moves_aside']}")


def show(summary: dict[str, Any], folder: Path) -> None:
    """The last word on the terminal."""
    console = Console()
    metrics, before = summary["metrics"], summary.get("sft_metrics") or {}
    table = Table(title=f"{summary['stage']} in {summary['wall_seconds']:.0f} s → {folder}", title_justify="left")
    table.add_column("")
    if summary["stage"] == "ppo":
        table.add_column("SFT", justify="right")
        table.add_column("PPO", justify="right")
        for key, (label, scale) in ROWS.items():
            if key in metrics:
                table.add_row(label, *(f"{row[key] * scale:.2f}" if key in row else "" for row in (before, metrics)))
    else:
        table.add_column(summary["stage"], justify="right")
        for key, value in metrics.items():
            table.add_row(key, f"{value:.4f}")
    console.print(table)


def main() -> None:
    """Entry point of `rlhf` and `python -m rlhf`."""
    # Hydra would print its own, longer account of an error and exit with 1
    os.environ["HYDRA_FULL_ERROR"] = "1"
    logging.raiseExceptions = False  # a log file that cannot be written is no reason for a traceback a line
    if "dry_run=true" in sys.argv and {"-m", "--multirun"} & set(sys.argv):
        # a listing in order, from one process
        launching = ("hydra/launcher=", "hydra.launcher.", "cluster=")
        sys.argv = [word for word in sys.argv if not word.startswith(launching)] + ["hydra/launcher=basic"]
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(KEYBOARD)
    except Exception as error:
        exit_with_sentence("rlhf", error)
        raise
