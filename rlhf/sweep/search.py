"""A hyper-parameter search by Optuna (Akiba et al. 2019), through Hydra's plugin for it.

The plugin asks Optuna for trials, launches them as jobs and reports their objective values to Optuna. This module adds
a study that the same command continues, the `plan.json` that rlhf-status reads, and checks before the first trial.
"""

import difflib
import hashlib
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from hydra.utils import instantiate
from hydra_plugins.hydra_optuna_sweeper._impl import OptunaSweeperImpl, create_params_from_overrides
from omegaconf import OmegaConf
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from rlhf.errors import ConfigError
from rlhf.files import PLAN, write_json
from rlhf.objectives import objectives_of
from rlhf.pipeline.cache import locked
from rlhf.report.metric_info import EVAL_METRICS
from rlhf.sweep.plan import distinctive_overrides, on_slurm, parallel_jobs, run_folder
from rlhf.tracking.seeds import SEED_KEYS

log = logging.getLogger(__name__)
Space = dict[str, BaseDistribution]
SAME_STUDY = ("hydra", "report", "variant", "replicate")  # keys that tell no studies apart, or only by what they set


class Study(OptunaSweeperImpl):
    """Hydra's Optuna sweeper, for `n_trials` finished trials in total over all starts of the command.

    Attributes:
        runs: folder name → overrides of every finished or launched trial.
        target_trials: the configured `n_trials`; `n_trials` itself is what this start still has to run.
    """

    runs: dict[str, list[str]]
    target_trials: int

    def sweep(self, arguments: list[str]) -> None:
        """Run the missing trials: first those that ended without a result, then new ones.

        Raises:
            ConfigError: no objectives or no axes, an unknown metric, or the seed as an axis.
        """
        # 1. the search space, without the keys that the command line fixes
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        objectives = objectives_of(self.config)
        space, fixed = create_params_from_overrides([*self._parse_sweeper_params_config(), *arguments])
        space = {name: distribution for name, distribution in space.items() if name not in fixed}
        check(space, objectives)
        self.direction, self.target_trials, self.runs = list(objectives.values()), self.n_trials, {}
        if self.config.dry_run:
            self._preview(space, fixed)
            return
        # 2. the trials, by the plugin's own loop
        folder = Path(self.config.hydra.sweep.dir)
        with locked(folder / ".study.lock", f"another process searches in {folder}"):
            self._open_study(space, fixed, objectives)
            try:
                super().sweep(arguments)
            except ValueError as error:  # the plugin prints the best trial, which fails if no trial has finished
                if "No trials are completed" not in str(error):
                    raise

    def _open_study(self, space: Space, fixed: dict[str, Any], objectives: Mapping[str, str]) -> None:
        """Create or continue the study of this configuration in `study.db`, which may hold other studies as well."""
        self.study_name = f"{self.config.name}-{self._digest(space, objectives)}"
        study = optuna.create_study(
            study_name=self.study_name, storage=self.storage, directions=self.direction, load_if_exists=True
        )
        trials = study.get_trials()
        enqueue_unfinished(study, trials)
        done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        self._add_to_plan([[f"{key}={value}" for key, value in {**trial.params, **fixed}.items()] for trial in done])
        self.n_trials = max(0, self.target_trials - len(done))
        log.info("%d of %d trials are finished", len(done), self.target_trials)
        self._seed_sampler(len(trials))

    def _seed_sampler(self, trials: int) -> None:
        """Seed the sampler with the configured seed plus the number of trials so far.

        With the same seed at every start, a continued study would draw its first trials again.
        """
        chosen = self.config.hydra.sweeper.sampler
        if "seed" in chosen:
            seed = self.config.seed if chosen.seed is None else chosen.seed
            self.sampler = instantiate(chosen, seed=seed + trials)

    def _configure_trials(
        self, trials: list[Trial], search_space_distributions: Space, fixed_params: dict[str, Any]
    ) -> Sequence[Sequence[str]]:
        # the plugin calls this for every batch of trials, before it launches them
        jobs = super()._configure_trials(trials, search_space_distributions, fixed_params)
        if not self.config.dry_run:
            self._add_to_plan(jobs)
        return jobs

    def _add_to_plan(self, jobs: Sequence[Sequence[str]]) -> None:
        """Add trials, given by their overrides, to the sweep's `plan.json`, which rlhf-status and the report read."""
        how = self.config.hydra.job.config.override_dirname
        self.runs |= {run_folder(self.config, list(job)): distinctive_overrides(job, how.exclude_keys) for job in jobs}
        runs = [{"folder": folder, "overrides": overrides} for folder, overrides in self.runs.items()]
        launcher = self.config.hydra.launcher
        at_once = self.n_jobs if on_slurm(launcher) else min(self.n_jobs, parallel_jobs(launcher))
        plan = {"runs": runs, "jobs": at_once, "to_come": max(0, self.target_trials - len(runs))}
        write_json(Path(self.config.hydra.sweep.dir) / PLAN, plan)

    def _preview(self, space: Space, fixed: dict[str, Any]) -> None:
        """Launch the first trial of a new study as a dry run, without writing a study."""
        self._seed_sampler(0)
        study = optuna.create_study(directions=self.direction, sampler=self.sampler)
        self.launcher.launch(self._configure_trials([study.ask()], space, fixed), initial_job_idx=0)

    def _digest(self, space: Space, objectives: Mapping[str, str]) -> str:
        """Eight hex digits that identify a study: a hash of the run configuration, the axes and the objectives."""
        left_out = {*SAME_STUDY, *self.config.hydra.job.config.override_dirname.exclude_keys}
        kept = {str(key): self.config[key] for key in self.config if key not in left_out}
        plain = {
            key: OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
            for key, node in kept.items()
        }
        axes = {name: repr(distribution) for name, distribution in space.items()}
        text = json.dumps([plain, axes, list(objectives.items())], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def check(space: Mapping[str, Any], objectives: Mapping[str, str]) -> None:
    """Check what would otherwise be found only after a run, or after the whole study.

    Raises:
        ConfigError: no objectives, an unknown metric among them, no axes, or the seed as an axis.
    """
    if not objectives:
        raise ConfigError("hydra/sweeper=search needs objectives, such as 'objectives={eval/win_rate: maximize}'")
    for metric in objectives:
        if metric.startswith("eval/") and metric not in EVAL_METRICS:
            close = difflib.get_close_matches(metric, EVAL_METRICS, n=1)
            hint = f", did you mean {close[0]}?" if close else ""
            raise ConfigError(f"objectives.{metric}: there is no such metric{hint}; allowed: {', '.join(EVAL_METRICS)}")
    if not space:
        raise ConfigError(
            "hydra/sweeper=search has nothing to search; allowed: an axis such as kl.coef=interval(0.01,0.1)"
        )
    for key in SEED_KEYS:
        if key in space:
            raise ConfigError(f"{key} is an axis of the search, which would find the luckiest one; allowed: one seed")


def enqueue_unfinished(study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
    """Enqueue the parameters of trials that failed, or were running when an earlier command ended, once each.

    Trials that were running are marked as failed: their process no longer exists.
    """
    known = [trial.system_attrs.get("fixed_params") for trial in trials if trial.state == TrialState.WAITING]
    known += [trial.params for trial in trials if trial.state == TrialState.COMPLETE]
    for trial in trials:
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
        if trial.state in (TrialState.RUNNING, TrialState.FAIL) and trial.params and trial.params not in known:
            study.enqueue_trial(trial.params)
            known.append(trial.params)
