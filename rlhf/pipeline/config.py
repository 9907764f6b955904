"""From a composed configuration to settings and objects: typed values, and the classes that `_target_` keys name."""

import inspect
import logging
from collections.abc import Iterator
from contextlib import suppress
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import hydra
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf

from rlhf.data.records import DataSource
from rlhf.errors import ConfigError, DataError, first_line
from rlhf.errors.users_code import failure_in_users_code
from rlhf.pipeline.precision import automatic_dtype, trains_on_gpu
from rlhf.pipeline.values import check_groups, values_of
from rlhf.schema import typed
from rlhf.settings import ModelSettings, Settings

log = logging.getLogger(__name__)

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
    check_groups(config)
    _settle_dtype(config)
    return values_of(config)


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
    check_numbers(config, key)
    try:
        return hydra.utils.instantiate(config, *args, _convert_="all", **kwargs)
    except InstantiationException as error:
        if isinstance(error.__cause__, DataError | ConfigError):  # it says already what is wrong
            raise error.__cause__ from None
        theirs = error.__cause__ and failure_in_users_code(error.__cause__)
        raise ConfigError(f"{key}: {theirs or error.__cause__ or error}".replace("\n", " ")) from error


def check_numbers(config: Any, key: str) -> None:
    """Check numbers and truth values against the type hints of the target, which Python itself ignores.

    Raises:
        ConfigError: a value is of another type than the target asks for.
    """
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
        cause = error.__cause__ or error
        theirs = failure_in_users_code(cause) or f"{type(cause).__name__}: {first_line(cause)}"
        raise ConfigError(
            f"{key}._target_={node._target_} cannot be imported ({theirs}); allowed: a class as package.module.Name"
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
