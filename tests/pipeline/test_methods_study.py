"""experiments/methods.yaml: what its rows have in common and what they differ in."""

from rlhf.pipeline.checks import check
from rlhf.pipeline.config import data_source, settings_of
from tests.helpers.composed_config import composed, composed_settings

ADVANTAGES = {"ppo": "gae", "rloo": "rloo", "grpo": "grpo", "reinforce_plus_plus": "reinforce_plus_plus"}
BEST_OF = ("best_of_n", "expert_iteration")
ROWS = [*ADVANTAGES, "dpo", *BEST_OF]
ANSWERS = 3200
EVALUATED = [2, 4, 6, 8, 10, 20, 30, 40]


def test_every_method_is_a_row_and_passes_the_checks() -> None:
    study = composed("experiments=methods", with_hydra=True)
    axes = study.hydra.sweeper.params
    assert axes.variant.split(",") == list(study.report.labels) == ROWS
    assert len(axes.replicate.split(",")) >= 3
    assert f"{ANSWERS:,} answers" in study.report.notes
    for name in ROWS:
        row = composed("experiments=methods", f"variant={name}")
        check(row, settings_of(row), data_source(row))
        assert row.stage.name == ("ppo" if name in ADVANTAGES else name)
        assert row[row.stage.name].eval_every == EVALUATED


def test_methods_are_compared_at_equal_samples_from_the_policy() -> None:
    rows = {name: composed_settings("experiments=methods", f"variant={name}") for name in ROWS}
    for name, advantages in ADVANTAGES.items():
        assert rows[name].advantages.name == advantages
        assert rows[name].ppo.steps * rows[name].ppo.rollout_batch_size == ANSWERS
        for key in ("minibatch_size", "epochs", "lr"):
            assert getattr(rows[name].ppo, key) == getattr(rows["ppo"].ppo, key)
    for name in BEST_OF:
        own = getattr(rows[name], name)
        assert own.rounds * own.prompts_per_round * own.n == ANSWERS
        assert (own.n, own.epochs) == (rows["grpo"].generation.samples_per_prompt, rows["ppo"].ppo.epochs)
    dpo = rows["dpo"].dpo
    assert dpo.steps * dpo.batch_size == ANSWERS  # comparisons: it samples nothing


def test_the_penalty_of_each_method_is_where_it_was_published() -> None:
    for name in ADVANTAGES:
        row = composed("experiments=methods", f"variant={name}")
        expected = ("bregman", "loss") if name == "grpo" else ("kl", "auto")
        assert (row.divergence.name, row.kl.placement) == expected
