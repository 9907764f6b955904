"""What a study looks for: `objectives`, a direction for each of one or more metrics. No torch here."""

import math
from collections.abc import Mapping, MutableMapping
from typing import Any

from rlhf.errors import ConfigError

DIRECTIONS = ("maximize", "minimize")
WIN = "eval/win_rate"  # what a job returns that was given no objectives


def objectives_of(config: MutableMapping[Any, Any]) -> dict[str, str]:
    """Metric → direction; empty without objectives.

    Raises:
        ConfigError: a direction that is none, or no metrics with directions at all.
    """
    asked = config.get("objectives") or {}
    if not isinstance(asked, Mapping):
        raise ConfigError(f"objectives={asked} is not allowed; allowed: null or {{metric: {' or '.join(DIRECTIONS)}}}")
    chosen = {str(metric): str(direction) for metric, direction in asked.items()}
    for metric, direction in chosen.items():
        if direction not in DIRECTIONS:
            raise ConfigError(f"objectives.{metric}={direction} is not allowed; allowed: {' or '.join(DIRECTIONS)}")
    return chosen


def result(metrics: Mapping[str, Any], objectives: Mapping[str, str]) -> float | list[float] | None:
    """What Hydra's sweeper is told of a run: a number for each objective; None where one is missing or not finite."""
    values = [metrics.get(metric) for metric in (objectives or {WIN: ""})]
    numbers = [float(value) for value in values if value is not None and math.isfinite(value)]
    if len(numbers) < len(values):
        return None
    return numbers[0] if len(numbers) == 1 else numbers
