"""Hydra composes faster, and the same: the suite does it a thousand times, and each time from the same files."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from hydra._internal import defaults_list
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.plugins.config_source import ConfigResult


def read_each_file_once() -> None:
    """Keep what was read of a file until it changes."""
    load = FileConfigSource.load_config

    @cache
    def known(place: str, path: str, provider: str, changed: int) -> ConfigResult:
        return load(FileConfigSource(provider, place), path)

    def load_config(self: FileConfigSource, config_path: str) -> ConfigResult:
        file = Path(self.path, self._normalize_file_name(config_path))
        if not file.exists():
            return load(self, config_path)  # which says so
        return deepcopy(known(self.path, config_path, self.provider, file.stat().st_mtime_ns))

    FileConfigSource.load_config = load_config  # type: ignore[method-assign]


def map_choices_where_they_are_used() -> None:
    """Leave out the map of all choices, made anew for each of them, unless a list of defaults interpolates."""
    make: Callable[..., Any] = defaults_list._create_interpolation_map

    def wanted(overrides: Any, defaults: list[Any], *rest: Any) -> Any:
        return make(overrides, defaults, *rest) if any(one.is_interpolation() for one in defaults) else None

    defaults_list._create_interpolation_map = wanted
