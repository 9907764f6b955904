"""Estimates of a run's memory from overrides of the default configuration."""

from rlhf.models.memory import Memory, estimate
from tests.helpers.composed_config import composed_settings

VOCABULARY = 500


def estimate_of(*overrides: str, reward: bool = True, shares: int = 1) -> Memory:
    found = estimate(composed_settings(*overrides), VOCABULARY, reward, shares)
    assert found is not None
    return found
