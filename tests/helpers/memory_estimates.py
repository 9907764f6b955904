"""Estimates of a run's memory from overrides of the default configuration."""

from rlhf.models.memory import Memory, Work, stage_memory
from rlhf.models.sizes import Sizes
from rlhf.settings import Settings
from tests.helpers.composed_config import composed_settings

VOCABULARY = 500


def sizes_of(settings: Settings, vocabulary: int = VOCABULARY) -> Sizes:
    found = Sizes.of(settings.model, vocabulary)
    assert found is not None
    return found


def estimate_of(*overrides: str, stage: str = "ppo", reward: bool = True, shares: int = 1) -> Memory:
    settings = composed_settings(*overrides)
    return stage_memory(stage, settings, sizes_of(settings), Work((stage,), reward, shares=shares))
