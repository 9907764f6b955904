"""The plan of a sweep: its jobs, their folders, and how many of them run at once."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, flag_override

from rlhf.distributed.cores import available_cores
from rlhf.errors import ConfigError
from rlhf.files import PLAN, read_object
from rlhf.objectives import objectives_of, result
from rlhf.sweep.resolvers import folder_name
from rlhf.tracking.evaluations import shown_summary

# -- jobs and their folders ------------------------------------------------------------------------------------------


def planned_runs(config: DictConfig) -> list[dict[str, Any]]:
    """Every run of the sweep, as `{"folder": name, "overrides": [...]}`; a search has no such plan.

    Raises:
        ConfigError: two runs with different overrides would share a folder.
    """
    excluded = config.hydra.job.config.override_dirname.exclude_keys
    runs: dict[str, list[str]] = {}
    for overrides in _expand_axes(config):
        folder, distinctive = run_folder(config, overrides), distinctive_overrides(overrides, excluded)
        if runs.setdefault(folder, distinctive) != distinctive:
            raise ConfigError(
                f"{' '.join(runs[folder])} and {' '.join(distinctive)} would share the folder {folder}; "
                "allowed: values that do not contain _key- as if another key followed"
            )
    return [{"folder": folder, "overrides": overrides} for folder, overrides in runs.items()]


def earlier_runs(folder: Path, runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The runs of earlier sweeps in a folder that a new plan does not name: they are there, and in the reports."""
    if not (folder / PLAN).exists():
        return []
    plan, named = read_object(folder / PLAN, runs=list), {run["folder"] for run in runs}
    return [run for run in [*plan.get("earlier", []), *plan["runs"]] if run["folder"] not in named]


def _expand_axes(config: DictConfig) -> list[list[str]]:
    """The overrides of every job: the product of all axes, expanded by Hydra's own code."""
    parser = OverridesParser.create()
    axes = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    batches = BasicSweeper.split_arguments(parser.parse_overrides([*axes, *config.hydra.overrides.task]), None)
    return batches[0]


def plan_of_dry_run(config: DictConfig, folder: Path) -> dict[str, Any]:
    """The plan in the form of `plan.json`, which a dry run does not write.

    A search plans as it goes: its runs are those in the `plan.json` of an earlier start, and `to_come` counts the
    trials that are not chosen yet.
    """
    if not is_search(config):
        return {"runs": planned_runs(config)}
    runs = read_object(folder / PLAN, runs=list)["runs"] if (folder / PLAN).exists() else []
    return {"runs": runs, "to_come": max(0, config.hydra.sweeper.n_trials - len(runs))}


def run_folder(config: DictConfig, overrides: list[str]) -> str:
    """The name of a run's folder inside the sweep's folder, from the overrides of its job."""
    how = config.hydra.job.config.override_dirname
    parsed = OverridesParser.create().parse_overrides(overrides)
    return folder_name(
        get_overrides_dirname(
            overrides=parsed, kv_sep=how.kv_sep, item_sep=how.item_sep, exclude_keys=list(how.exclude_keys)
        )
    )


def distinctive_overrides(overrides: Iterable[str], excluded: Iterable[str]) -> list[str]:
    """The overrides that distinguish a run from others: all whose key is not in `excluded`."""
    return [override for override in overrides if override.lstrip("+~").partition("=")[0] not in set(excluded)]


def trainer_configs(config: DictConfig) -> list[DictConfig]:
    """The different `trainer` configurations among the jobs of the sweep."""
    if is_search(config):
        return [config.trainer]
    # one job per combination of trainer overrides is composed, since composing takes a second
    jobs = {tuple(item for item in job if item.lstrip("+~").startswith("trainer")): job for job in _expand_axes(config)}
    return [compose(config.hydra.job.config_name, job).trainer for job in jobs.values()]


def configs_of_all_values(config: DictConfig) -> Iterator[DictConfig]:
    """Configurations of as few jobs as it takes to have every value of every axis in one of them."""
    seen: set[str] = set()
    for job in _expand_axes(config):
        if not seen.issuperset(job):
            seen.update(job)
            yield compose(config.hydra.job.config_name, job)


def without_hydra(config: DictConfig) -> DictConfig:
    """The configuration of the job in one that Hydra's callbacks get."""
    copy = config.copy()
    with flag_override(copy, ["struct", "readonly"], [False, False]):
        del copy["hydra"]
    return copy


def objective_values(run: Path, config: DictConfig) -> float | list[float] | None:
    """The values of `objectives` in the summary of a run's folder, for a sweeper; None without a summary."""
    summary = shown_summary(run)
    return None if summary is None else result(summary["metrics"], objectives_of(config))


# -- sweeper and launcher --------------------------------------------------------------------------------------------


def is_search(config: DictConfig) -> bool:
    """Whether the sweep is run by `hydra/sweeper=search`."""
    return str(config.hydra.sweeper.get("_target_")).endswith("rlhf_search.Search")


def on_slurm(launcher: DictConfig) -> bool:
    """Whether the jobs are run by `hydra/launcher=slurm`."""
    return str(launcher.get("_target_")).endswith("rlhf_slurm.SlurmLauncher")


def parallel_jobs(launcher: DictConfig) -> int:
    """How many jobs a launcher runs at once on this machine; as in joblib, `n_jobs: -1` means one per core."""
    jobs = int(launcher.get("n_jobs") or 1)
    return jobs if jobs > 0 else max(1, available_cores() + 1 + jobs)


def planned_parallelism(plan: Path) -> int:
    """How many runs are under way at once, according to a `plan.json`."""
    return int(read_object(plan).get("jobs", 1))
