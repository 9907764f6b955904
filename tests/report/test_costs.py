"""The costs behind the variance table's advice, from recorded times."""

import json
from pathlib import Path

import pytest

from rlhf.report.costs import evaluation_cost, upstream_cost
from rlhf.report.runs import load
from rlhf.report.variance_table import variance_table
from tests.helpers.made_up_sweeps import STEPS, write_pipelines


def build(folder: Path, seconds: float, **config: object) -> None:
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"metrics": {}, "wall_seconds": seconds, "config": config}))


def test_costs_are_in_ppo_runs(tmp_path: Path) -> None:
    sweep = load([write_pipelines(tmp_path / "s", replicates=(1, 2))])
    assert evaluation_cost(sweep.finished) == pytest.approx(2.0 * len(STEPS) / 60)
    assert upstream_cost(sweep.finished) == 0
    build(tmp_path / "cache" / "reward-1", 30.0)
    build(tmp_path / "cache" / "sft-other", 500.0, sft={"seed": 5})
    build(tmp_path / "cache" / "sft-mine", 15.0, sft={"seed": 1})
    assert upstream_cost(sweep.finished) == pytest.approx(45 / 60)


def test_dear_upstream_models_make_seeds_the_better_buy(tmp_path: Path) -> None:
    folder = write_pipelines(tmp_path / "s", variants=["lora_kl"], replicates=(1, 2, 3, 4), seeds=(1, 2), spread=0.0)

    metric = "learned reward"  # which differs from run to run, not from pipeline to pipeline
    table = variance_table(load([folder]))
    assert table is not None
    at = [line[0] for line in table.rows].index(metric)
    assert table.rows[at][-1] == "a pipeline"
    build(tmp_path / "cache" / "reward-1", 6000.0)
    dear = variance_table(load([folder]))
    assert dear is not None
    assert dear.rows[at][-1] == "a PPO seed in each"
