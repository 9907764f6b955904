"""experiments/methods.yaml: what its rows have in common and what they differ in."""

from rlhf.pipeline.checks import check
from rlhf.pipeline.config import data_source, settings_of
from tests.helpers.composed_config import composed

METHODS = {"ppo": "gae", "rloo": "rloo", "grpo": "grpo", "reinforce_plus_plus": "reinforce_plus_plus"}


def test_methods_are_compared_at_equal_samples_from_the_policy() -> None:
    axes = composed("experiments=methods", with_hydra=True).hydra.sweeper.params
    assert axes.variant.split(",") == list(METHODS)
    assert len(axes.replicate.split(",")) >= 3
    rows = {name: composed("experiments=methods", f"variant={name}") for name in METHODS}
    assert {name: row.advantages.name for name, row in rows.items()} == METHODS
    first = rows["ppo"]
    assert set(first.report.labels) == set(METHODS)
    for row in rows.values():
        check(row, settings_of(row), data_source(row))
        assert row.divergence.name == "kl"
        for key in ("steps", "rollout_batch_size", "minibatch_size", "epochs", "lr"):
            assert row.ppo[key] == first.ppo[key]
