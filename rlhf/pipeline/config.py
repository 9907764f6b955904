"""From a composed configuration to settings and objects: typed values, and the classes that `_target_` keys name."""

import inspect
import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import hydra
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf import root
from rlhf.data.records import DataSource
from rlhf.errors import ConfigError, DataError
from rlhf.errors.keys import unknown_key
from rlhf.pipeline.precision import automatic_dtype, trains_on_gpu
from rlhf.schema import typed
from rlhf.settings import ModelSettings, Settings

log = logging.getLogger(__name__)

# Groups whose options name a class by `_target_`.
CLASSES = ("data", "scorer", "judge", "preferences", "kl", "trainer", "logger")
# A type that a signature may ask for → the types accepted for it, and its name in an error message.
NUMBERS: dict[Any, tuple[Any, str]] = {
    int: (int, "a whole number"),
    float: (int | float, "a number"),
    bool: (bool, "true or false"),
    NoneType: (NoneType, "null"),
}


def settings_of(config: DictConfig) -> Settings:
    """The typed settings of a composed configuration.

    `model.dtype=auto` is replaced by a dtype in the configuration itself: cached models, identity and summary name the
    one that was used.

    Raises:
        ConfigError: a key does not exist or has no value, or a value has the wrong type or is not allowed.
    """
    _check_keys(config)
    _check_replicate(config)
    _check_classes(config)
    _settle_dtype(config)
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"{missing[0]} has no value, and there is no default for it")
    try:
        chosen: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or ''}: {str(error).partition(chr(10))[0]}") from error
    return typed(Settings, {field.name: chosen[field.name] for field in fields(Settings)})


def _check_keys(config: DictConfig) -> None:
    """Refuse a top-level key that nothing reads: it is a typo, or a name of an older version."""
    own = {str(key) for key in OmegaConf.load(root() / "conf" / "config.yaml")} - {"defaults"}
    allowed = own | {field.name for field in fields(Settings)} | set(CLASSES) | {"stage"}
    for key in config:
        if str(key) not in allowed:
            raise ConfigError(unknown_key(str(key), allowed - {"hydra"}))


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
    own = OmegaConf.select(config, "reward.model", throw_on_missing=False)
    if own is not None and not isinstance(own, DictConfig):
        options = sorted(path.stem for path in (root() / "conf" / "model").glob("*.yaml"))
        raise ConfigError(f"reward.model={own} names no option; allowed: model@reward.model={', '.join(options)}")


def _settle_dtype(config: DictConfig) -> None:
    for key in ("model", "reward.model"):
        node = OmegaConf.select(config, key, throw_on_missing=False)
        if not isinstance(node, DictConfig) or node.get("dtype") != "auto":
            continue
        model = typed(ModelSettings, OmegaConf.to_container(node, resolve=True), f"{key}.")  # type: ignore[arg-type]
        node.dtype = automatic_dtype(model, trains_on_gpu(config))
        log.info("%s.dtype=auto: %s", key, node.dtype)


def instantiate(config: Any, key: str, *args: Any, **kwargs: Any) -> Any:
    """`hydra.utils.instantiate`, with failures that name the key.

    Raises:
        ConfigError: the target cannot be imported, or does not accept these keys or values.
        DataError: the target itself found its data unusable.
    """
    _check_numbers(config, key)
    try:
        return hydra.utils.instantiate(config, *args, _convert_="all", **kwargs)
    except InstantiationException as error:
        if isinstance(error.__cause__, DataError | ConfigError):  # it says already what is wrong
            raise error.__cause__ from None
        raise ConfigError(f"{key}: {error.__cause__ or error}".replace("\n", " ")) from error


def _check_numbers(config: Any, key: str) -> None:
    """Check numbers and truth values against the type hints of the target, which Python itself ignores."""
    hints: dict[str, Any] = {}
    # a target that cannot be inspected fails, or not, when it is instantiated
    with suppress(HydraException, ValueError, ImportError, AttributeError, NameError, TypeError, KeyError):
        target = hydra.utils.get_object(config["_target_"])
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    for name, value in config.items() if hints else ():
        hint = hints.get(name)
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if all(kind in NUMBERS for kind in kinds) and not any(_is(value, kind) for kind in kinds):
            allowed = " or ".join(NUMBERS[kind][1] for kind in kinds)
            raise ConfigError(f"{key}.{name}={value} is not allowed; allowed: {allowed}")


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is acceptable as `kind`; a bool, which is an int in Python, is not accepted as a number."""
    return isinstance(value, NUMBERS[kind][0]) and (kind is bool or not isinstance(value, bool))


def data_source(config: DictConfig) -> DataSource:
    """The data set that `data` describes; none of its rows is read yet.

    Raises:
        ConfigError: the target cannot be imported, does not accept these keys, or is not a data source.
    """
    source = instantiate(config.data, "data")
    if not isinstance(source, DataSource):
        raise ConfigError(f"data._target_={config.data._target_} is no data set; allowed: one with `splits` and `load`")
    return source


def target_class(node: DictConfig, key: str) -> Any:
    """The class or function that `_target_` names in the group `key`; nothing is instantiated.

    Raises:
        ConfigError: it cannot be imported.
    """
    try:
        return hydra.utils.get_object(node._target_)
    except (HydraException, ValueError, ImportError, AttributeError) as error:
        raise ConfigError(
            f"{key}._target_={node._target_} cannot be imported; allowed: a class as package.module.Name"
        ) from error


def needs(config: DictConfig, key: str, what: str) -> bool:
    """Whether the class that a group names, or any class nested in it, sets `what` (such as `needs_reward_model`)."""
    nested = [node for node in nodes(OmegaConf.select(config, key)) if "_target_" in node]
    return any(getattr(target_class(node, key), what, False) for node in nested)


def needs_reward_model(config: DictConfig) -> bool:
    """Whether the scorer or the judge uses the reward model."""
    return any(needs(config, key, "needs_reward_model") for key in ("scorer", "judge") if key in config)


def nodes(node: Any) -> Iterator[DictConfig]:
    """A node of the configuration and all mappings inside it."""
    if isinstance(node, DictConfig):
        yield node
        for child in node.values():
            yield from nodes(child)
    elif isinstance(node, ListConfig):
        for child in node:
            yield from nodes(child)
