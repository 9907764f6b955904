"""Replicates: which runs the statistics count as one, and what is compared in pairs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.report.checks import warnings
from rlhf.report.comparisons import baseline, compare, comparisons, difference_table
from rlhf.report.results import main_table
from rlhf.report.runs import Sweep, load
from rlhf.report.statistics import difference, mean_of
from tests.helpers.made_up_sweeps import PROMPTS, write_pipelines, write_run, write_sweep

WIN = "eval/win_rate"


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return load([write_pipelines(tmp_path_factory.mktemp("pipelines") / "s")])


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return load([write_pipelines(tmp_path_factory.mktemp("nested") / "s", seeds=(1, 2, 3))])


def with_seeds(folder: Path, sft: int, reward: int, ppo: int) -> None:
    """A run at these seeds, each of which is an override of its own."""
    axes = [f"sft.seed={sft}", f"reward.seed={reward}", f"seed={ppo}"]
    config = {"seed": ppo, "sft": {"seed": sft, "lr": 0.1}, "reward": {"seed": reward}}
    write_run(folder / "_".join(axes), "lora_kl", ppo, config=config, overrides=["variant=lora_kl", *axes])


def test_runs_that_differ_in_any_seed_are_replicates_of_one_row(tmp_path: Path) -> None:
    for seeds in ((0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)):
        with_seeds(tmp_path / "s", *seeds)
    sweep = load([tmp_path / "s"])
    assert [row.label for row in sweep.rows] == ["SFT", "variant=lora_kl"]
    assert len(sweep.trained[0].runs) == 4
    assert not sweep.unlike


@pytest.mark.parametrize(
    ("seeds", "unit", "count"),
    [
        ([(1, 1, 1), (2, 2, 2), (2, 2, 3)], "pipelines", 2),
        ([(1, 1, 1), (1, 2, 1), (1, 2, 2), (1, 3, 1)], "reward models", 3),
        ([(1, 1, 1), (1, 1, 2)], "seeds", 2),
    ],
)
def test_what_is_counted_is_the_first_stage_that_varies(
    tmp_path: Path, seeds: list[tuple[int, int, int]], unit: str, count: int
) -> None:
    for one in seeds:
        with_seeds(tmp_path / "s", *one)
    sweep = load([tmp_path / "s"])
    assert (sweep.unit, len(sweep.trained[0].replicates)) == (unit, count)
    table = main_table(sweep)
    assert table.header[1] == unit
    assert table.rows[1][1] == count
    assert f"count {count} {unit}" in table.caption
    shares = {"pipelines": False, "reward models": True, "seeds": True}
    assert ("All runs share one SFT model" in table.caption) == shares[unit]
    assert "do not cover the choice of data or world, model size, judge" in table.caption


def test_seeds_of_one_pipeline_count_once(nested: Sweep) -> None:
    row = nested.trained[0]
    outcomes = row.outcomes(WIN)
    assert outcomes is not None
    assert (len(row.runs), len(row.replicates), outcomes.shape) == (12, 4, (4, PROMPTS))
    by_run = np.array([run.summary["metrics"][WIN] for run in row.runs]).reshape(4, 3)
    assert row.values(WIN) == pytest.approx(by_run.mean(axis=1))
    error = main_table(nested).rows[1][3].error  # type: ignore[union-attr]
    assert error == pytest.approx(100 * by_run.mean(axis=1).std(ddof=1) / 2)
    assert main_table(nested).header[:3] == ["row", "pipelines", "runs"]


def test_every_pipeline_has_its_own_start_in_the_row_of_sft(pipelines: Sweep) -> None:
    sft, trained = pipelines.rows[:2]
    assert list(sft.replicates) == list(trained.replicates)
    starts = [run.summary["sft_metrics"][WIN] for run in trained.runs]
    assert sft.values(WIN) == starts
    assert len(set(starts)) == 4
    assert warnings(pipelines) == []


def test_rows_of_the_same_pipelines_are_paired_which_takes_their_common_luck_out(pipelines: Sweep) -> None:
    found = comparisons(pipelines, baseline(pipelines), [WIN])
    (trained,) = found
    assert trained.row.label == "variant=lora_none"
    assert trained.unpaired is not None
    assert trained.unpaired.mean == pytest.approx(trained.difference.mean)
    widths = [gap.high - gap.low for gap in (trained.difference, trained.unpaired)]
    assert widths[0] < 0.6 * widths[1]
    table = difference_table(pipelines, found, baseline(pipelines))
    assert "unpaired interval" in table.header
    assert "by pipeline" in table.caption


def test_pairs_are_the_pipelines_that_both_rows_have(tmp_path: Path) -> None:
    folder = write_pipelines(tmp_path / "s", variants=["lora_kl"], replicates=(1, 2, 3))
    write_pipelines(folder, variants=["lora_none"], replicates=(2, 3, 4, 5))
    sweep = load([folder])
    kl, none = sweep.trained
    gap = compare(none, kl, WIN, pair=True)
    assert gap is not None
    common = [(2, 3), (1, 2)]  # replicates 2 and 3 among the values of each row
    ours, theirs = (np.array(row.values(WIN)) for row in (none, kl))
    expected = ours[[0, 1]].mean() - theirs[list(common[1])].mean()
    assert gap.difference.mean == pytest.approx(expected)
    assert any("different numbers of pipelines (3 to 4)" in text for text in warnings(sweep))


def test_seeds_of_ppo_alone_are_not_paired_unless_asked_for(sweep: Sweep) -> None:
    found = comparisons(sweep, baseline(sweep), [WIN])
    assert all(item.unpaired is None for item in found)
    assert sweep.rows[0].replicates == {}


def test_seeds_of_ppo_are_paired_if_the_layout_asks_for_it(tmp_path: Path) -> None:
    kept = load([write_sweep(tmp_path / "kept", {"pair_seeds": False})])
    asked = load([write_sweep(tmp_path / "asked", {"pair_seeds": True})])
    for sweep, paired in ((kept, False), (asked, True)):
        found = comparisons(sweep, baseline(sweep), [WIN])
        assert [item.unpaired is not None for item in found] == [paired] * 2
        assert ("by seed" in difference_table(sweep, found, baseline(sweep)).caption) == paired
    ours, theirs = asked.trained[2].outcomes(WIN), asked.trained[0].outcomes(WIN)
    assert ours is not None
    assert theirs is not None
    assert found[-1].difference == difference(ours, theirs, paired=True)
    assert found[-1].unpaired == difference(ours, theirs, paired=False)


def test_the_interval_of_a_row_is_that_of_its_mean_over_pipelines_and_instructions(pipelines: Sweep) -> None:
    row, cell = pipelines.trained[0], main_table(pipelines).rows[1][3]
    outcomes = row.outcomes(WIN)
    assert outcomes is not None
    told = mean_of(outcomes)
    assert (cell.low, cell.high) == pytest.approx((100 * told.low, 100 * told.high))  # type: ignore[union-attr]
    assert " to +" not in str(cell)


def test_equal_seeds_on_different_reward_models_are_warned_of(tmp_path: Path) -> None:
    folder = write_pipelines(tmp_path / "s", variants=["lora_kl"], replicates=(1, 2), seeds=(1, 2))
    assert warnings(load([folder])) == []
    run = next(folder.glob("*replicate-2_seed-2")) / "summary.json"
    run.write_text(run.read_text().replace("reward-2", "reward-9"))
    assert any("different reward models (reward-2, reward-9)" in text for text in warnings(load([folder])))


def shared_by(folder: Path, rows: list[dict[str, Any]]) -> str:
    """The sentence about what runs share, for rows with these summaries and two PPO seeds each."""
    for number, row in enumerate(rows):
        for seed in (1, 2):
            config = {"seed": seed, "sft": {"seed": 0, "lr": row.get("lr", 0.1)}, "reward": {"seed": 0}}
            axes = [f"row={number}", f"seed={seed}"]
            models = {"reward_model": row["reward_model"]} if "reward_model" in row else {}
            write_run(folder / "_".join(axes), "lora_kl", seed, config=config, overrides=axes, **models)
    return main_table(load([folder])).caption


SHARED: list[tuple[list[dict[str, Any]], str]] = [
    ([{"reward_model": "reward-a"}] * 2, "All runs share one SFT model and one reward model: "),
    ([{}] * 2, "All runs share one SFT model and one reward model: "),  # early versions
    ([{"reward_model": None}] * 2, "All runs share one SFT model: "),  # a classifier is the scorer
    (
        [{"reward_model": "reward-a"}, {"reward_model": "reward-b"}],
        "All runs of a row share one SFT model and one reward model, but rows differ in theirs: ",
    ),
    (
        [{"reward_model": None, "lr": 0.1}, {"reward_model": None, "lr": 0.2}],
        "All runs of a row share one SFT model, but rows differ in theirs: ",
    ),
    (
        [{"reward_model": None}, {"reward_model": "reward-a"}],
        "All runs share one SFT model and, if they need one, one reward model: ",
    ),
]


@pytest.mark.parametrize(("rows", "sentence"), SHARED)
def test_what_runs_are_said_to_share_is_what_they_recorded(
    tmp_path: Path, rows: list[dict[str, Any]], sentence: str
) -> None:
    """Equal seeds alone do not make equal models."""
    assert sentence in shared_by(tmp_path / "s", rows)
