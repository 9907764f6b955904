"""What a sweep intends: its jobs, their folders, and who runs them."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra import compose
from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from rlhf.errors import ConfigError
from rlhf.files import SUMMARY, read_object
from rlhf.objectives import objectives_of, result
from rlhf.sweep.resolvers import folder_name

PLAN = "plan.json"


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


def trainers(config: DictConfig) -> list[DictConfig]:
    """The different trainers that the jobs of the sweep ask for."""
    if is_search(config):
        return [config.trainer]
    jobs = {tuple(item for item in job if item.lstrip("+~").startswith("trainer")): job for job in _expanded(config)}
    return [compose(config.hydra.job.config_name, job).trainer for job in jobs.values()]


def intended(config: DictConfig, folder: Path) -> dict[str, Any]:
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


def jobs_of(plan: Path) -> int:
    """How many jobs the sweep runs at once."""
    return int(read_object(plan).get("jobs", 1))
