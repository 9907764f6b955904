"""The costs behind the variance table's advice, from recorded times."""

import json
from itertools import product
from pathlib import Path

import pytest

from rlhf.report.costs import UpstreamCosts, evaluation_cost, upstream_costs
from rlhf.report.runs import load
from rlhf.report.variance_design import Costs, Design
from rlhf.report.variance_table import sources_of, variance_table
from tests.helpers.made_up_sweeps import STEPS, write_pipelines, write_run


def build(folder: Path, seconds: float, **config: object) -> None:
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"metrics": {}, "wall_seconds": seconds, "config": config}))


def test_costs_are_in_ppo_runs(tmp_path: Path) -> None:
    sweep = load([write_pipelines(tmp_path / "s", replicates=(1, 2))])
    assert evaluation_cost(sweep.finished) == pytest.approx(2.0 * len(STEPS) / 60)
    assert upstream_costs(sweep.finished) == UpstreamCosts(0, 0, 0)
    build(tmp_path / "cache" / "reward-1", 30.0)
    build(tmp_path / "cache" / "sft-other", 500.0, sft={"seed": 5})
    build(tmp_path / "cache" / "sft-mine", 15.0, sft={"seed": 1})
    assert upstream_costs(sweep.finished) == pytest.approx((15 / 60, 0, 30 / 60))


def test_an_sft_model_costs_what_it_takes_without_a_reward_model_too(tmp_path: Path) -> None:
    """As with a classifier for a scorer: there is nothing but SFT above PPO."""
    folder = write_pipelines(tmp_path / "s", replicates=(1, 2))
    for path in folder.glob("*/summary.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"reward_model": None}))
    build(tmp_path / "cache" / "sft-mine", 90.0, sft={"seed": 1})
    assert upstream_costs(load([folder]).finished) == pytest.approx((90 / 60, 0, 0))


def test_preferences_that_were_sampled_cost_their_time(tmp_path: Path) -> None:
    folder = write_pipelines(tmp_path / "s", replicates=(1, 2))
    build(tmp_path / "cache" / "preferences-a", 120.0)
    build(tmp_path / "cache" / "reward-1", 30.0)
    path = tmp_path / "cache" / "reward-1" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"preferences": "preferences-a"}))
    assert upstream_costs(load([folder]).finished) == pytest.approx((0, 120 / 60, 30 / 60))


def test_one_more_of_a_source_costs_its_runs_and_its_rows_share_of_the_models(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    for sft, reward, ppo in product((1, 2, 3), (1, 2, 3), (1, 2)):
        axes = [f"sft.seed={sft}", f"reward.seed={reward}", f"seed={ppo}"]
        config = {"seed": ppo, "sft": {"seed": sft}, "reward": {"seed": reward}}
        write_run(folder / "_".join(axes), "lora_kl", ppo, config=config, overrides=axes)
    sweep = load([folder])
    design = Design.of(sweep)
    sources = sources_of(sweep, design, "eval/reward")
    assert sources is not None
    assert design.names == ["SFT models", "reward models", "PPO seeds"]
    assert [list(sources.groups_added(number)) for number in range(3)] == [
        pytest.approx(added) for added in ([1, 3, 6], [0, 3, 6], [0, 0, 9])
    ]
    costs = Costs(0.2, UpstreamCosts(1.0, 10.0, 100.0))
    assert [costs.of_more(sources, design, number) for number in range(3)] == pytest.approx(
        [317, 306, 9]
    )  # preferences: one set per SFT model
    assert costs.of_instructions(sources, 60) == pytest.approx(0.2 * 60 / 120 * 18)


def test_dear_upstream_models_make_seeds_the_better_buy(tmp_path: Path) -> None:
    folder = write_pipelines(tmp_path / "s", variants=["lora_kl"], replicates=(1, 2, 3, 4), seeds=(1, 2), spread=0.0)

    metric = "reward"  # which differs from run to run, not from pipeline to pipeline
    table = variance_table(load([folder]))
    assert table is not None
    at = [line[0] for line in table.rows].index(metric)
    assert table.rows[at][-1] == "a pipeline"
    build(tmp_path / "cache" / "reward-1", 6000.0)
    dear = variance_table(load([folder]))
    assert dear is not None
    assert dear.rows[at][-1] == "a PPO seed in each"
