"""Which overrides distinguish runs."""

from rlhf.tracking.overrides import distinguishing, in_all


def test_what_all_runs_have_distinguishes_none() -> None:
    runs = [("ppo.steps=2", "scorer.function=a", "+x=1"), ("scorer.function=b", "ppo.steps=2", "+x=1")]
    common = in_all(runs)
    assert common == ["ppo.steps=2", "+x=1"]
    assert [distinguishing(run, common) for run in runs] == ["scorer.function=a", "scorer.function=b"]


def test_of_a_single_run_nothing_is_common() -> None:
    assert in_all([("ppo.steps=2",)]) == []
    assert in_all([]) == []
