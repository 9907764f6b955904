"""Keys that were added later: at their defaults a run is the one that it was before, and with other values another."""

from copy import deepcopy
from pathlib import Path

import pytest

from rlhf.pipeline import identity
from tests.helpers.composed_config import composed_plan

OTHERS = ["advantages=rloo", "generation.samples_per_prompt=2", "ppo.clip_range_high=0.28", "ppo.dual_clip=3",
          "ppo.ratio=sequence", "ppo.loss_aggregation=constant", "kl.placement=loss",
          "ppo.entropy_coef=0.01", "ppo.ptx_coef=0.1", "ppo.score_transform=par", "loss_terms=[old_kl]"]  # fmt: skip


def test_a_run_from_before_a_key_was_added_is_still_the_same_run(tmp_path: Path) -> None:
    """A configuration that a run recorded then has none of the keys, and means their defaults."""
    plan = composed_plan(tmp_path, "data=farm")  # the other farm has values of its own
    recorded = deepcopy(plan.plain)
    for name in identity.OFF:
        *groups, key = name.split(".")
        node = recorded
        for group in groups:
            node = node[group]
        node.pop(key, None)
    assert plan._identity_of(recorded) == plan._identity_of(plan.plain)


@pytest.mark.parametrize("override", OTHERS)
def test_another_value_makes_another_run_of_the_same_models(tmp_path: Path, override: str) -> None:
    plain, other = composed_plan(tmp_path), composed_plan(tmp_path, override)
    assert plain.identity != other.identity
    assert plain.needed() == other.needed()
