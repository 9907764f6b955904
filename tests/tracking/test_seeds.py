"""The keys that hold seeds."""

from rlhf.tracking.seeds import SEED_KEYS, Seeds, seeds_of, without_seeds
from tests.helpers.composed_config import composed


def test_overrides_of_seeds_are_left_out_however_they_are_written() -> None:
    seeds = [f"{sign}{key}=3" for key in SEED_KEYS for sign in ("", "+", "++")]
    assert without_seeds(["lora.r=8", *seeds, "data.seed=1", "seeds=2"]) == ("lora.r=8", "data.seed=1", "seeds=2")


def test_replicate_moves_the_seeds_of_all_stages_and_single_axes_only_their_own() -> None:
    assert seeds_of(composed()) == Seeds(0, 0, 0, 0)
    assert seeds_of(composed("replicate=3", "preferences=simulated")) == Seeds(3, 3, 3, 3)
    assert seeds_of(composed("replicate=3", "reward.seed=1")) == Seeds(3, 0, 1, 3)
    assert seeds_of(composed("recipe=paper", "replicate=2")) == Seeds(44, 0, 44, 2)


def test_a_configuration_without_seeds_has_those_of_0() -> None:
    assert seeds_of({}) == seeds_of({"seed": None, "sft": 3}) == Seeds(0, 0, 0, 0)
