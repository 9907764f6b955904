"""`reference` in the configuration: what is refused, what it costs, and that it decides the run."""

import re
from pathlib import Path

import pytest

from rlhf.errors import ConfigError
from rlhf.finished.as_trained import as_trained
from rlhf.finished.run import FinishedRun
from rlhf.models.memory import stage_memory
from rlhf.pipeline.preflight import work_of
from tests.helpers.composed_config import compose_and_check, composed, composed_plan
from tests.helpers.finished_runs import finished_outputs
from tests.helpers.memory_estimates import VOCABULARY, sizes_of

REFUSED = [
    ("reference=ema reference.decay=1", "reference.decay=1 is not allowed; allowed: a number from 0 to below 1"),
    ("reference=ema reference.decay=fast", "reference.decay=fast is not allowed; allowed: a number"),
    ("reference=reset reference.every=0", "reference.every=0 is not allowed; allowed: a whole number above 0"),
    ("reference=reset reference.decay=-1", "reference.decay=-1"),
    ("reference=sync reference.every=null", "nothing would move; allowed: one of them"),
    ("reference=sync reference.every=0", "reference.every=0"),
    ("reference=sync reference.share=0", "reference.share=0 is not allowed; allowed: a number above 0 and up to 1"),
    ("reference=sync reference.at_kl=0", "reference.at_kl=0 is not allowed; allowed: a number above 0, or null"),
    ("reference=ema divergence=none", "divergence=none has none; allowed: reference=fixed or reset, or a divergence"),
    ("reference=sync divergence=none", "divergence=none has none"),
    ("reference._target_=rlhf.ppo.FixedKL +reference.coef=1", "is no rule; allowed: a class with `role` and `move`"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED, ids=[row[0] for row in REFUSED])
def test_a_mistake_is_refused_before_any_model(arguments: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        compose_and_check(*arguments.split())


@pytest.mark.parametrize("arguments", ["reference=reset divergence=none", "reference=sync lora=none", "reference=ema"])
def test_what_makes_sense_is_allowed(arguments: str) -> None:
    compose_and_check(*arguments.split())


def test_the_estimate_counts_a_further_adapter_or_model(tmp_path: Path) -> None:
    def weights(*overrides: str) -> int:
        plan = composed_plan(tmp_path, *overrides)
        sizes = sizes_of(plan.settings, VOCABULARY)
        return stage_memory("ppo", plan.settings, sizes, work_of(plan, unmade=False)).weights

    adapter = 4 * 4 * 8 * 2 * 96  # blocks, matrices, rank, inputs and outputs
    assert weights("reference=ema") - weights() == 2 * 4 * adapter
    assert weights("reference=reset") == weights("reference=ema")
    assert (
        weights("reference=sync", "lora=none") - weights("lora=none")
        == 4 * sizes_of(composed_plan(tmp_path).settings, VOCABULARY).parameters
    )


def test_it_decides_the_run_and_nothing_else(tmp_path: Path) -> None:
    plans = [
        composed_plan(tmp_path, *overrides)
        for overrides in ([], ["reference=ema"], ["reference=ema", "reference.decay=0.5"], ["reference=reset"])
    ]
    assert len({plan.identity for plan in plans}) == len(plans)
    assert len({(plan.evaluation, plan.sft_folder, plan.reward_folder) for plan in plans}) == 1


def test_a_run_of_an_earlier_version_is_measured_with_the_fixed_reference(tmp_path: Path) -> None:
    run = FinishedRun.open(finished_outputs(tmp_path / "outputs").ppo)
    run.config.pop("reference", None)
    assert as_trained(composed("stage=evaluate"), run, []).reference._target_.endswith(".Fixed")
    with pytest.raises(ConfigError, match=r"reference=ema: policy=.* is measured as it was trained"):
        as_trained(composed("stage=evaluate", "reference=ema"), run, ["reference=ema"])
