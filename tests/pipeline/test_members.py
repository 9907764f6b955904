"""The reward models of an ensemble and of an average: which are needed, under which names, and a run with each."""

import re
from pathlib import Path

import pytest

from rlhf.files import read_json
from rlhf.pipeline import members
from rlhf.pipeline.identity import decisive
from rlhf.pipeline.preflight import work_of
from tests.helpers.command_line import TINY, run_in_process
from tests.helpers.composed_config import composed_plan


def test_a_member_is_the_reward_model_of_its_seed(tmp_path: Path) -> None:
    """Under the name that it has for itself, so that it is built once."""
    plan = composed_plan(tmp_path, "scorer=ensemble", "scorer.members=3", "reward.seed=5")
    needed = members.needed(plan)
    alone = [composed_plan(tmp_path, f"reward.seed={seed}").reward_folder for seed in (5, 1005, 2005)]
    assert list(needed) == ["sft", "reward_member_1", "reward_member_2", "reward"]
    assert [needed[key] for key in ("reward", "reward_member_1", "reward_member_2")] == alone
    assert work_of(plan, unmade=True).stages == ("sft", "reward", "reward", "reward", "ppo")
    assert work_of(plan, unmade=True).members == 2


def test_the_members_of_an_average_are_needed_until_it_is_made(tmp_path: Path) -> None:
    plan = composed_plan(tmp_path, "reward.average_of=2", "reward.seed=5")
    alone = [composed_plan(tmp_path, f"reward.seed={seed}").reward_folder for seed in (5, 1005)]
    needed = members.needed(plan)
    assert list(needed.values())[1:] == [*alone, plan.reward_folder]
    assert plan.reward_folder not in alone
    assert members.averaged(plan) == alone
    plan.reward_folder.mkdir(parents=True)
    (plan.reward_folder / "summary.json").write_text('{"stage": "reward", "metrics": {}}')
    assert list(members.needed(plan)) == ["sft", "reward"]


def test_a_key_at_the_value_that_does_nothing_is_as_good_as_absent() -> None:
    """So a run of a version without the key is the same run."""
    old, new = {"reward": {"lr": 1}}, {"reward": {"lr": 1, "average_of": 1}}
    assert decisive(new) == old != decisive({"reward": {"lr": 1, "average_of": 2}})


@pytest.mark.slow
def test_every_reward_model_that_tells_prompts_apart_is_warned_of_once_per_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the command trains it or finds it made, and the members of an ensemble, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlhf.stages.reward.MOST_SPREAD", 0.0)
    for name, lr, reward_models in (("a", 1e-3, 1), ("b", 1e-3, 2), ("c", 1e-4, 2)):
        ensemble = ["scorer=ensemble", "scorer.members=2"] if reward_models > 1 else []
        assert run_in_process(*TINY, f"ppo.lr={lr}", f"hydra.run.dir={name}", *ensemble) == 0
        warned = re.findall(r"the scores of (\S+) differ", Path(name, "cli.log").read_text())
        assert len(warned) == len(set(warned)) == reward_models
    assert set(warned) == {path.parent.name for path in Path("outputs/cache").glob("reward-*/summary.json")}


@pytest.mark.slow
def test_an_ensemble_and_an_average_train_and_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share their members; another evaluation of the ensemble's run scores by all of its members, too."""
    monkeypatch.chdir(tmp_path)
    assert run_in_process(*TINY, "name=e", "hydra.run.dir=outputs/e/run", "scorer=ensemble", "scorer.members=2") == 0
    built = set(Path("outputs/cache").glob("reward-*/summary.json"))
    assert len(built) == 2
    run = read_json(Path("outputs/e/run/summary.json"))
    assert {run["reward_model"], *run["reward_members"]} == {path.parent.name for path in built}
    again = [*TINY, "name=e", "hydra.run.dir=outputs/e/run", "scorer=ensemble", "scorer.members=2"]
    assert run_in_process(*again, "evaluation.prompts=3") == 0
    (results,) = Path("outputs/e/run/evaluations").glob("*/summary.json")
    assert read_json(results)["sft_metrics"]["eval/reward"] != run["sft_metrics"]["eval/reward"]
    assert run_in_process(*TINY, "name=w", "hydra.run.dir=outputs/w/run", "reward.average_of=2") == 0
    (average,) = set(Path("outputs/cache").glob("reward-*/summary.json")) - built
    assert set(read_json(average)["members"]) == {path.parent.name for path in built}
    assert read_json(Path("outputs/w/run/summary.json"))["reward_model"] == average.parent.name
