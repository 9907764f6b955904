"""Estimates of a run's memory from overrides of the default configuration."""

from functools import cache

from rlhf.models.memory import Memory, Work, stage_memory
from rlhf.models.sizes import Sizes
from rlhf.settings import Settings
from tests.helpers.composed_config import composed_settings

VOCABULARY = 500
LLAMA_7B = (
    "{model_type:llama,hidden_size:4096,intermediate_size:11008,num_hidden_layers:32,num_attention_heads:32,"
    "num_key_value_heads:32}"
)
NEOX_20B = "{model_type:gpt_neox,hidden_size:6144,intermediate_size:24576,num_hidden_layers:44,num_attention_heads:64}"


def sizes_of(settings: Settings, vocabulary: int = VOCABULARY) -> Sizes:
    found = Sizes.of(settings.model, vocabulary)
    assert found is not None
    return found


@cache
def estimated(*overrides: str) -> tuple[Settings, Sizes]:
    """What an estimate reads, the same for all stages."""
    settings = composed_settings("data=farm", *overrides)
    return settings, sizes_of(settings)


def estimate_of(*overrides: str, stage: str = "ppo", reward: bool = True, shares: int = 1) -> Memory:
    return stage_memory(stage, *estimated(*overrides), Work((stage,), reward, shares=shares))
