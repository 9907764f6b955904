"""Schemas of the configuration: which values a key may have, and the check that it has one of them.

A schema is a dataclass. `typed` merges a configuration into it, by which OmegaConf checks keys and types; `positive`,
`fraction`, `choice` and their like declare which values are allowed. A key that is a keyword of Python has an
underscore behind it in its schema: `from_`.
"""

import keyword
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import field, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar

import omegaconf
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf.errors import ConfigError
from rlhf.errors.keys import unknown_key

T = TypeVar("T")
ALL_LINEAR = "all-linear"  # of `lora.target_modules`: all linear layers, whatever they are called
# How OmegaConf says that a value has the wrong type, and what it calls the types that we check.
NOT_CONVERTED = re.compile(
    r"Value '(.*)' (?:of type '.*' could not be converted to|is not a valid) (Integer|Float|bool)"
)
KINDS = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}


def checked(check: Callable[[Any], bool], allowed: str, default: Any = omegaconf.MISSING) -> Any:
    """A field whose value must pass `check`; `allowed` says in an error message which values do.

    A mutable default is copied for every object.
    """
    metadata = {"check": check, "allowed": allowed}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def positive(default: Any = omegaconf.MISSING) -> Any:
    """A number above 0."""
    return checked(lambda x: x > 0, "a number above 0", default)


def number_or_auto(default: float, whole: bool = True) -> Any:
    """A whole number above 0, or the word auto; unless it must be `whole`, any finite number, or auto."""
    if whole:
        return checked(lambda x: x == "auto" or (type(x) is int and x > 0), "a whole number above 0, or auto", default)

    def right(x: Any) -> bool:
        return x == "auto" or (type(x) in (int, float) and math.isfinite(x))

    return checked(right, "a number, or auto", default)


def number_or_list() -> Any:
    """A whole number above 0, or a list of such numbers."""

    def right(x: Any) -> bool:
        return type(x) is int and x > 0 if not isinstance(x, list) else bool(x) and all(map(right, x))

    return checked(right, "a whole number above 0, or a list of them")


def at_least_zero(default: Any = omegaconf.MISSING) -> Any:
    """A number of 0 or above."""
    return checked(lambda x: x >= 0, "a number of 0 or above", default)


def optional_positive(default: Any = None) -> Any:
    """A number above 0, or null."""
    return checked(lambda x: x is None or x > 0, "a number above 0, or null", default)


def fraction(default: Any = omegaconf.MISSING) -> Any:
    """A number from 0 to 1."""
    return checked(lambda x: 0 <= x <= 1, "a number from 0 to 1", default)


def seed() -> Any:
    """A seed that both numpy and torch accept; 0 by default."""
    return checked(lambda x: 0 <= x < 2**32, "a whole number from 0 to 4294967295", 0)


def choice(*options: str) -> Any:
    """One of a few words; the first is the default."""
    return checked(lambda x: x in options, " or ".join([", ".join(options[:-1]), options[-1]]), options[0])


def typed(schema: type[T], values: Mapping[Any, Any], prefix: str = "") -> T:
    """Convert values to an object of their schema, checking every one; error messages put `prefix` before the keys.

    Raises:
        ConfigError: a key does not exist, or a value has the wrong type or is not allowed.
    """
    structure = _structure(schema)
    _check_nesting(values, structure, prefix)
    try:
        settings: T = OmegaConf.to_object(OmegaConf.merge(structure, _without_keywords(values)))  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        key, message = (error.full_key or "").removesuffix("_"), str(error).partition("\n")[0]
        if "not in" in message:
            parent = OmegaConf.select(structure, key.rpartition(".")[0])
            raise ConfigError(
                unknown_key(f"{prefix}{key}", (str(name).removesuffix("_") for name in parent or ()))
            ) from error
        converted = NOT_CONVERTED.match(message)
        if converted:
            message = f"{prefix}{key}={converted[1]} is not allowed; allowed: {KINDS[converted[2]]}"
            raise ConfigError(message) from error
        raise ConfigError(f"{prefix}{key}: {message}") from error
    check_values(settings, prefix)
    return settings


@cache
def _structure(schema: type) -> DictConfig:
    """The schema as OmegaConf reads it; merging copies it."""
    structure: DictConfig = OmegaConf.structured(schema)
    return structure


def _without_keywords(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """The same keys under the names that they have in a schema."""
    return {
        f"{key}_" if keyword.iskeyword(str(key)) else key: _without_keywords(value)
        if isinstance(value, dict)
        else value
        for key, value in values.items()
    }


def _check_nesting(values: Mapping[Any, Any], schema: DictConfig, prefix: str) -> None:
    """Refuse a single value where keys are expected, because OmegaConf's error would not name the place."""
    for key, value in values.items():
        node = schema.get(key) if key in schema else None
        if isinstance(node, DictConfig) and isinstance(value, dict):
            _check_nesting(value, node, f"{prefix}{key}.")
        elif isinstance(node, DictConfig) and value is not None:
            raise ConfigError(
                f"{prefix}{key}={value} is not allowed; allowed: keys below it ({', '.join(sorted(map(str, node)))})"
            )


def check_values(settings: Any, prefix: str = "") -> None:
    """Check every field against what its declaration allows.

    Raises:
        ConfigError: names the key, its value and what is allowed.
    """
    for item in fields(settings):
        value, key = getattr(settings, item.name), f"{prefix}{item.name.removesuffix('_')}"
        if is_dataclass(value):
            check_values(value, f"{key}.")
        elif isinstance(value, dict) and "check" not in item.metadata:
            for name, part in value.items():
                if is_dataclass(part):
                    check_values(part, f"{key}.{name}.")
        elif value == omegaconf.MISSING:
            raise ConfigError(f"{key} has no value; allowed: {item.metadata.get('allowed', 'a value')}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key}={value} is not allowed; allowed: {item.metadata.get('allowed', 'a number')}")
        elif "check" in item.metadata and not item.metadata["check"](value):
            raise ConfigError(f"{key}={value} is not allowed; allowed: {item.metadata['allowed']}")
