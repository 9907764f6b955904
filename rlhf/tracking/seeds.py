"""The keys that hold the seeds of a pipeline: runs that differ in nothing else are replicates of one configuration."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# `replicate` sets all the others (conf/config.yaml)
SEED_KEYS = ("replicate", "sft.seed", "preferences.seed", "reward.seed", "seed")


class Seeds(NamedTuple):
    """The seeds of one pipeline from the top down: each stage builds on the ones before it."""

    sft: int
    preferences: int
    reward: int
    ppo: int


def seeds_of(config: Mapping[str, Any]) -> Seeds:
    """The seeds in a resolved configuration; 0 where it has none, or something else in its place."""

    def seed(*path: str) -> int:
        node: Any = config
        for key in path:
            node = node.get(key) if isinstance(node, Mapping) else None
        return node if isinstance(node, int) else 0

    return Seeds(seed("sft", "seed"), seed("preferences", "seed"), seed("reward", "seed"), seed("seed"))


def without_seeds(overrides: Iterable[str]) -> tuple[str, ...]:
    """The overrides that replicates share: all but those of `SEED_KEYS`."""
    return tuple(item for item in overrides if item.lstrip("+~").partition("=")[0] not in SEED_KEYS)
