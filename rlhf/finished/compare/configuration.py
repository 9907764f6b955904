"""The configuration of a comparison: that of the first run among the players, changed by what the command line says."""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

import rlhf.sweep.resolvers  # noqa: F401  (registers the resolvers that `conf` uses)
from rlhf import import_from_here, root
from rlhf.data.records import DataSource
from rlhf.errors import ConfigError
from rlhf.finished.run import FinishedRun
from rlhf.pipeline.config import needs, nodes, target_class

FOLLOWED = ("data", "evaluation", "generation", "judge")  # groups in which a comparison follows the first run
OPTION = "of_the_run"  # the name under which Hydra sees the run's choice in these groups
OVERRIDE = re.compile(r"(?:~|\+{0,2})[\w./@-]+=.*|~[\w.@]+", re.DOTALL)


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a command line that name something, and its overrides (`key=value`, `~key`)."""
    overrides = [word for word in words if OVERRIDE.fullmatch(word) and not Path(word).exists()]
    return [word for word in words if word not in overrides], overrides


def compose(overrides: Sequence[str], run: FinishedRun | None, options: Path | None = None) -> DictConfig:
    """The configuration with the overrides, for a run in its own data, evaluation, generation and judge.

    A group that the command line chooses itself (`judge=llm_pool`) replaces the run's. `options` is a folder with
    further options (`--config-dir`).

    Raises:
        ConfigError: there is no such folder.
        HydraException, OmegaConfBaseException: an override is wrong (`rlhf.errors.explaining` says how).
    """
    if options and not options.is_dir():
        raise ConfigError(f"--config-dir={options}: there is no such folder")
    import_from_here()
    chosen = {word.partition("=")[0] for word in overrides}
    with tempfile.TemporaryDirectory() as folder:
        own = []
        for group in FOLLOWED if run else ():
            if run and group in run.config and not any(key.split("/")[0] == group for key in chosen):
                path = Path(folder, group, f"{OPTION}.yaml")
                path.parent.mkdir()
                OmegaConf.save(OmegaConf.create(run.config[group]), path)
                own.append(f"{group}={OPTION}")
        if run and "output_dir" not in chosen:
            own.append(f'output_dir="{outputs_of(run)}"')
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(root() / "conf")):
            places = [root(), folder, *([options.resolve()] if options else [])]
            searchpath = ",".join(f'"file://{place}"' for place in places)
            return hydra.compose("config", [f"hydra.searchpath=[{searchpath}]", *own, *overrides])


def outputs_of(run: FinishedRun) -> Path:
    """The folder of all outputs that a run is in, whose cache it shares; `outputs` if it lies outside of any."""
    return next((place for place in run.folder.resolve().parents if (place / "cache").is_dir()), Path("outputs"))


def check_judge(config: DictConfig, source: DataSource) -> dict[str, Any]:
    """Check before anything is loaded that the judge can compare any two answers; return its keys.

    Raises:
        ConfigError: it compares nothing, needs what is not there, finds its own keys wrong, or cannot be reached.
    """
    target = target_class(config.judge, "judge")
    name = config.judge._target_
    if not hasattr(target, "needs_reward_model"):
        raise ConfigError(f"judge._target_={name} is no judge; allowed: a class that says `needs_reward_model`")
    if not getattr(target, "compares", True):
        raise ConfigError("judge=none compares nothing; allowed: gold, llm_pool, finished_reward_model or your own")
    if needs(config, "judge", "needs_reward_model"):
        raise ConfigError(
            "judge=reward_model is the reward model of a run in training; allowed: judge=finished_reward_model with "
            "judge.folder=FOLDER, a reward model in outputs/cache"
        )
    if needs(config, "judge", "needs_utility") and not hasattr(source, "utility"):
        raise ConfigError(
            "judge=gold compares by a true utility, which only data=farm has; allowed: "
            "llm_pool, finished_reward_model or a judge of your own (without a judge on the command line it is that of "
            "the first run)"
        )
    keys: dict[str, Any] = OmegaConf.to_container(config.judge, resolve=True)  # type: ignore[assignment]
    for node in nodes(config.judge):
        own = getattr(target_class(node, "judge"), "check", None) if "_target_" in node else None
        if own:
            own(OmegaConf.to_container(node, resolve=True))
    if hasattr(target, "ping"):
        target.ping(keys)
    return keys
