"""The variance table: REML against published and independent figures, closed forms and a simulated truth."""

from pathlib import Path

import numpy as np
import pytest

from rlhf.report.runs import load
from rlhf.report.statistics import Array
from rlhf.report.variance import Labels, Sources, estimate_sources, reml
from rlhf.report.variance_design import Design
from rlhf.report.variance_table import sources_of, variance_table
from tests.helpers.made_up_sweeps import write_pipelines

# Davies & Goldsmith's Dyestuff data: the yields of six batches. Their REML estimates are in the manual of lme4.
DYESTUFF = [
    [1545, 1440, 1440, 1520, 1580], [1540, 1555, 1490, 1560, 1495], [1595, 1550, 1605, 1510, 1560],
    [1445, 1440, 1595, 1465, 1545], [1595, 1630, 1515, 1635, 1625], [1520, 1455, 1450, 1480, 1445],
]  # fmt: skip
# a made-up unbalanced design with two rows: the group of each value at the outer and at the inner level
OUTER = [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 4, 5, 5, 5, 5, 5, 5, 5, 6, 6, 6, 6, 6, 6, 7, 7, 7, 8, 8, 8, 8,
         8, 8, 9, 9, 9, 9, 9, 9, 9, 9, 10, 11, 11]  # fmt: skip
INNER = [0, 1, 1, 2, 3, 3, 3, 4, 5, 6, 7, 7, 7, 8, 8, 8, 9, 10, 10, 10, 11, 11, 12, 12, 13, 13, 14, 15, 15, 15, 16, 16,
         16, 17, 17, 18, 18, 18, 19, 20, 20, 20, 21, 21, 21, 22, 22, 23, 24, 24]  # fmt: skip
VALUES = [
    0.965, 0.629, 0.379, -2.644, -3.886, -4.605, -4.245, -1.664, 1.491, 3.069, -1.054, -0.58, -1.44, 0.357, 0.129,
    0.228, -0.392, -0.457, -0.819, -1.224, 0.312, 0.201, -2.049, -1.206, 10.325, 10.512, 9.666, 12.094, 10.529, 11.107,
    11.51, 9.524, 11.103, 13.647, 11.447, 11.36, 10.74, 12.108, 11.292, 6.947, 7.446, 6.012, 9.306, 10.609, 9.204,
    7.804, 7.195, 7.84, 12.426, 10.919,
]  # fmt: skip


def test_reml_finds_the_published_variances() -> None:
    batches = np.repeat(np.arange(6), 5)
    found = reml(np.ravel(DYESTUFF).astype(float), np.zeros(30, int), [batches, np.arange(30)])
    assert found == pytest.approx([1764.05, 2451.25], rel=1e-4)


def test_reml_agrees_with_statsmodels_on_an_unbalanced_nested_design() -> None:
    """The expected figures are those of statsmodels 0.15.0: mixedlm(V ~ C(row), groups=outer, vc inner, reml)."""
    outer = np.array(OUTER)
    found = reml(np.array(VALUES), (outer > 5).astype(int), [outer, np.array(INNER), np.arange(len(VALUES))])
    assert found == pytest.approx([2.4482, 0.8824, 0.4606], abs=5e-4)


def nested(sizes: tuple[int, int, int, int]) -> tuple[Labels, list[Labels]]:
    """Rows and the three nested sources of a balanced design."""
    places = np.indices(sizes).reshape(4, -1)
    labels = [np.ravel_multi_index(tuple(places[:depth]), sizes[:depth]) for depth in (2, 3, 4)]
    return places[0], list(labels)


def test_for_a_balanced_design_reml_is_the_analysis_of_variance() -> None:
    sizes, rng = (2, 5, 3, 2), np.random.default_rng(3)
    made = (
        rng.normal(0, 2, sizes[:2])[..., None, None]
        + rng.normal(0, 1, sizes[:3])[..., None]
        + rng.normal(0, 0.5, sizes)
    )
    inner = made.var(axis=3, ddof=1).mean()
    middle = made.mean(axis=3).var(axis=2, ddof=1).mean() - inner / 2
    outer = made.mean(axis=(2, 3)).var(axis=1, ddof=1).mean() - (middle + inner / 2) / 3
    assert min(outer, middle, inner) > 0  # otherwise the two differ
    assert reml(made.ravel(), *nested(sizes)) == pytest.approx([outer, middle, inner], rel=1e-3)


def test_no_spread_and_no_freedom() -> None:
    rows, sources = nested((1, 3, 2, 2))
    assert reml(np.full(12, 0.3), rows, sources) == [0.0, 0.0, 0.0]
    assert np.isnan(reml(np.array([0.3]), np.zeros(1, int), [np.zeros(1, int)])).all()


def simulated(rng: np.random.Generator, sizes: tuple[int, int, int, int], prompts: int) -> Array:
    """[rows, SFT, reward, PPO, prompts] with the variances 4, 1, 0.25 of the stages and 9, 16 of the instructions."""
    made = rng.normal(0, 2, (*sizes[:2], 1, 1, 1)) + rng.normal(0, 1, (*sizes[:3], 1, 1))
    made = made + rng.normal(0, 0.5, (*sizes, 1)) + rng.normal(0, 3, (sizes[0], 1, 1, 1, prompts))
    return made + rng.normal(0, 4, (*sizes, prompts))


def test_the_sources_are_those_of_a_simulated_truth() -> None:
    rng, sizes, prompts = np.random.default_rng(0), (2, 5, 3, 2), 60
    rows, sources = nested(sizes)
    found = []
    for _ in range(150):
        made = simulated(rng, sizes, prompts)
        outcomes = [matrix.reshape(-1, prompts) for matrix in made]
        told = estimate_sources(made.mean(axis=-1).ravel(), rows, sources, outcomes)
        assert told.shares == pytest.approx(np.full((2, 3), [1 / 5, 1 / 15, 1 / 30]))
        assert told.prompts == prompts
        found.append([*told.nested, told.instructions, *told.interactions])
    assert np.mean(found, axis=0) == pytest.approx([4, 1, 0.25, 9, 0, 0, 16], rel=0.12, abs=0.15)


def test_the_standard_error_is_what_the_mean_of_a_row_varies_by_and_more_of_a_source_lowers_its_part() -> None:
    rng, truth = (
        np.random.default_rng(1),
        Sources((4.0, 1.0, 0.25), np.array([[1 / 5, 1 / 15, 1 / 30]]), 9.0, (0.0, 0.0, 16.0), 60),
    )
    means = np.concatenate([simulated(rng, (2, 5, 3, 2), 60).mean(axis=(1, 2, 3, 4)) for _ in range(1500)])
    assert np.std(means) == pytest.approx(truth.error, rel=0.04)
    assert truth.with_prompts(120).parts() == pytest.approx([*truth.parts()[:3], truth.parts()[3] / 2])
    assert truth.with_more(0).parts()[:3] == pytest.approx([part * 5 / 6 for part in truth.parts()[:3]])


def test_the_table_names_the_largest_source_and_what_the_design_cannot_tell(tmp_path: Path) -> None:
    folder = write_pipelines(tmp_path / "s", replicates=(1, 2, 3, 4, 5), seeds=(1, 2), spread=0.2)
    sweep = load([folder])
    design = Design.of(sweep)
    assert design.names == ["SFT models with reward models", "PPO seeds"]
    table = variance_table(sweep)
    assert table is not None
    line = dict(zip(table.header, table.rows[0], strict=True))
    assert str(line["largest source"]).startswith("SFT models with reward models (9")
    assert line["buy next"] == "a pipeline"
    sources = sources_of(sweep, design, "eval/win_rate")
    assert sources is not None
    assert line["SE of a row"].value == pytest.approx(100 * sources.error)  # type: ignore[union-attr]
    fewer = sum(part / more for part, more in zip(sources.parts()[:2], (6 / 5, 12 / 10), strict=True))
    fewer += (sources.instructions + np.dot(sources.interactions, [1 / 6, 1 / 12])) / sources.prompts
    assert line["with 1 more pipeline"].value == pytest.approx(100 * fewer**0.5)  # type: ignore[union-attr]
    assert "are one source: sft.seed" in table.caption
    assert "models rests on 4 degrees of freedom: the true one may be 0.6 to 2.9 times as large" in table.caption


def test_luck_that_the_rows_have_in_common_is_no_part_of_their_differences(tmp_path: Path) -> None:
    """The made-up pipelines differ by 20 points in every row alike, so only instructions blur the differences."""
    table = variance_table(load([write_pipelines(tmp_path / "s", replicates=range(1, 9), spread=0.2)]))
    assert table is not None
    alone, paired = (dict(zip(table.header, row, strict=True)) for row in (table.rows[0], table.rows[-1]))
    assert paired["metric"] == "win rate (%), paired difference"
    spreads = [line["SD over pipelines"].value for line in (alone, paired)]  # type: ignore[union-attr]
    assert spreads[0] > 12
    assert spreads[1] < 3
    assert str(paired["largest source"]).startswith("instructions")
    # 8 runs, of whose 60 seconds evaluation took 12: 100 more of 120 instructions cost as much as 1.3 runs
    assert (alone["buy next"], paired["buy next"]) == ("a pipeline", "instructions")


def test_seeds_of_one_pipeline_leave_the_upper_stages_open(tmp_path: Path) -> None:
    sweep = load([write_pipelines(tmp_path / "s", replicates=(1,), seeds=(1, 2, 3))])
    table = variance_table(sweep)
    assert table is not None
    assert "Not varied, so not counted: SFT, reward." in table.caption
    assert not any("pipeline" in name for name in table.header)  # nobody knows what other models would change
    line = dict(zip(table.header, table.rows[0], strict=True))
    assert 0 < line["with 1 more PPO seed"].value < line["SE of a row"].value  # type: ignore[union-attr]
    assert line["buy next"] in ("a PPO seed", "instructions")


def test_one_run_per_row_has_no_variance_table(tmp_path: Path) -> None:
    assert variance_table(load([write_pipelines(tmp_path / "s", replicates=(1,))])) is None


def test_a_row_with_one_run_does_not_hide_the_spread_of_the_others(tmp_path: Path) -> None:
    folder = write_pipelines(tmp_path / "s", variants=["lora_kl"], replicates=(1, 2, 3))
    write_pipelines(folder, variants=["lora_none"], replicates=(1,))
    sweep = load([folder])
    sources = sources_of(sweep, Design.of(sweep), "eval/gold_utility")
    assert sources is not None
    assert sources.shares == pytest.approx(np.array([[1 / 3], [1]]))
    assert sources.nested[0] + sources.interactions[0] / sources.prompts == pytest.approx(
        np.var(sweep.trained[0].values("eval/gold_utility"), ddof=1)
    )
