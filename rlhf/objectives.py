"""The `objectives` of a search: one or more metrics, each with a direction. Does not import torch."""

import math
from collections.abc import Mapping, MutableMapping
from typing import Any

from rlhf.errors import ConfigError

DIRECTIONS = ("maximize", "minimize")
WIN = "eval/win_rate"  # what a job returns without objectives


def objectives_of(config: MutableMapping[Any, Any]) -> dict[str, str]:
    """Metric → direction (`maximize` or `minimize`) by the configuration; {} without objectives.

    Raises:
        ConfigError: `objectives` is not a mapping, or a direction is unknown.
    """
    objectives = config.get("objectives") or {}
    if not isinstance(objectives, Mapping):
        raise ConfigError(
            f"objectives={objectives} is not allowed; allowed: null or {{metric: {' or '.join(DIRECTIONS)}}}"
        )
    chosen = {str(metric): str(direction) for metric, direction in objectives.items()}
    for metric, direction in chosen.items():
        if direction not in DIRECTIONS:
            raise ConfigError(f"objectives.{metric}={direction} is not allowed; allowed: {' or '.join(DIRECTIONS)}")
    return chosen


def result(metrics: Mapping[str, Any], objectives: Mapping[str, str]) -> float | list[float] | None:
    """What a job returns to Hydra's sweeper: the value of each objective, in their order.

    A single objective gives a number, not a list. None if a value is missing or not finite.
    """
    values = [metrics.get(metric) for metric in (objectives or {WIN: ""})]
    numbers = [float(value) for value in values if value is not None and math.isfinite(value)]
    if len(numbers) < len(values):
        return None
    return numbers[0] if len(numbers) == 1 else numbers
