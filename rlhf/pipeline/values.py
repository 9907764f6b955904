"""Groups, keys and values of a composed configuration, checked without torch: a typing error is found in a second."""

from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf import root
from rlhf.errors import ConfigError
from rlhf.errors.keys import keys_below, unknown_key
from rlhf.policy_settings import DivergenceSettings
from rlhf.schema import typed
from rlhf.settings import Settings

# Groups whose options name a class by `_target_`.
CLASSES = ("data", "scorer", "judge", "preferences", "kl", "reference", "trainer", "logger")


def check_groups(config: DictConfig) -> None:
    """Check that all groups and top-level keys are there, and no others.

    Raises:
        ConfigError: a key does not exist, or a group names nothing.
    """
    _check_keys(config)
    _check_replicate(config)
    _check_classes(config)


def values_of(config: DictConfig) -> Settings:
    """The typed settings of a composed configuration as it stands.

    Raises:
        ConfigError: a key does not exist or has no value, or a value has the wrong type or is not allowed.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"{missing[0]} has no value, and there is no default for it")
    try:
        chosen: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or ''}: {str(error).partition(chr(10))[0]}") from error
    # the recorded configuration of an earlier version may lack a group, which then has its defaults
    own = {field.name: chosen[field.name] for field in fields(Settings) if field.name in chosen}
    if isinstance(own["divergence"], dict):
        own["divergence"] = DivergenceSettings.keys(own["divergence"])
    return typed(Settings, own)


def _check_keys(config: DictConfig) -> None:
    """Refuse a top-level key that nothing reads: it is a typo, or a name of an older version."""
    allowed = _keys_of(root() / "conf" / "config.yaml") - {"defaults"}
    allowed |= {field.name for field in fields(Settings)} | set(CLASSES) | {"stage"}
    for key in config:
        if str(key) not in allowed:
            raise ConfigError(unknown_key(str(key), allowed - {"hydra"}, everywhere=keys_below(config)))


@cache
def _keys_of(file: Path) -> frozenset[str]:
    return frozenset(map(str, OmegaConf.load(file)))


def _check_replicate(config: DictConfig) -> None:
    """Check the number that all seeds are derived from, so that an error names it and not the first of them."""
    replicate = config.get("replicate", 0)
    if type(replicate) is not int or not 0 <= replicate < 2**31:
        raise ConfigError(f"replicate={replicate} is not allowed; allowed: a whole number from 0 to {2**31 - 1}")


def _check_classes(config: DictConfig) -> None:
    """Every group that names a class must do so; `judge=null`, for example, would leave it without one."""
    for group, key in (("stage", "name"), *((group, "_target_") for group in CLASSES)):
        chosen = config.get(group)
        options = sorted(path.stem for path in (root() / "conf" / group).glob("*.yaml"))
        if not isinstance(chosen, DictConfig) or OmegaConf.is_missing(chosen, key) or not chosen.get(key):
            raise ConfigError(f"{group}={chosen} has no {key}; allowed: {', '.join(options)}")
        if group == "stage" and chosen.name not in options:
            raise ConfigError(f"stage.name={chosen.name} is not allowed; allowed: {', '.join(options)}")
    for folder in sorted((root() / "conf").glob("*/*/")):  # groups inside groups
        key, group = f"{folder.parent.name}.{folder.name}", f"{folder.parent.name}/{folder.name}"
        options, named = sorted(path.stem for path in folder.glob("*.yaml")), OmegaConf.select(config, key)
        if options and isinstance(named, str):
            raise ConfigError(
                f"{key}={named} is a text, did you mean {group}={named}?; allowed: {group}={', '.join(options)}"
            )
    own = OmegaConf.select(config, "reward.model", throw_on_missing=False)
    if own is not None and not isinstance(own, DictConfig):
        options = sorted(path.stem for path in (root() / "conf" / "model").glob("*.yaml"))
        raise ConfigError(f"reward.model={own} names no option; allowed: model@reward.model={', '.join(options)}")
