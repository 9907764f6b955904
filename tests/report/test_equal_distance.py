"""Rows at equal distance: what is interpolated, what is not, and what the tables say."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.report.cli import make_report
from rlhf.report.comparisons import baseline, compare
from rlhf.report.equal_distance import (
    along_distance,
    at_distance,
    common_distances,
    compared_at,
    distance_difference_table,
    distance_table,
    reach,
)
from rlhf.report.findings import findings
from rlhf.report.runs import Sweep, load
from tests.helpers.made_up_sweeps import write_lines, write_pipelines, write_run

WIN = "eval/win_rate"


def write_path(folder: Path, variant: str, replicate: int, path: Sequence[tuple[float, Sequence[float]]]) -> None:
    """A run whose evaluations have this √KL and these outcomes of each prompt."""
    config = {"seed": replicate, "sft": {"seed": replicate}}
    axes = [f"variant={variant}", f"replicate={replicate}"]
    write_run(folder / "_".join(axes), variant, replicate, config=config, overrides=axes)
    lines = [
        {"step": 10 * number, "eval/true_kl": root**2, WIN: float(np.mean(wins))}
        for number, (root, wins) in enumerate(path)
    ]
    outcomes = [{"step": 10 * number, "win": list(wins)} for number, (_, wins) in enumerate(path)]
    write_lines(folder / "_".join(axes) / "metrics.jsonl", lines)
    write_lines(folder / "_".join(axes) / "outcomes.jsonl", outcomes)


@pytest.fixture
def two(tmp_path: Path) -> Sweep:
    """Row a goes straight to 0.8 and 1.0; row b turns back at 0.6 and comes again, later and worse."""
    write_path(tmp_path / "s", "a", 1, [(0, [0, 0]), (0.4, [0, 1]), (0.8, [1, 1])])
    write_path(tmp_path / "s", "a", 2, [(0, [0, 0]), (0.5, [1, 0]), (1.0, [1, 1])])
    back: list[Any] = [(0, [0, 0]), (0.6, [1, 1]), (0.2, [0, 0]), (0.6, [0, 0])]
    write_path(tmp_path / "s", "b", 1, back)
    write_path(tmp_path / "s", "b", 2, back)
    return load([tmp_path / "s"])


def test_values_and_outcomes_are_interpolated_in_the_root_of_the_kl(two: Sweep) -> None:
    a = two.trained[0]
    here = at_distance(a, 0.6)
    assert here is not None
    assert here.values(WIN) == pytest.approx([0.75, 0.6])
    outcomes = here.outcomes(WIN)
    assert outcomes is not None
    assert outcomes == pytest.approx(np.array([[0.5, 1], [1, 0.2]]))
    at_evaluation = at_distance(a, 0.4)
    assert at_evaluation is not None
    assert at_evaluation.values(WIN) == pytest.approx([0.5, 0.4])


def test_nothing_is_read_beyond_what_all_runs_of_a_row_reached(two: Sweep) -> None:
    a, b = two.trained
    assert (reach(a), reach(b)) == pytest.approx((0.8, 0.6))
    assert at_distance(a, 0.81) is None
    assert max(along_distance(a, WIN)) == pytest.approx(0.8)
    assert at_distance(a, 0.8) is not None


def test_the_first_time_at_a_distance_counts(two: Sweep) -> None:
    b = at_distance(two.trained[1], 0.3)
    assert b is not None
    assert b.values(WIN) == pytest.approx([0.5, 0.5])


def test_values_before_the_first_evaluation_are_marked_as_a_straight_line_from_sft(tmp_path: Path) -> None:
    """Row a is evaluated at 0.4 and 0.8, row b at 0.1 first; both have a second pipeline on the same path."""
    for replicate in (1, 2):
        wins = [[0, 0], [0, 1], [1, 1]]
        write_path(tmp_path / "s", "a", replicate, list(zip((0, 0.4, 0.8), wins, strict=True)))
        write_path(tmp_path / "s", "b", replicate, list(zip((0, 0.1, 0.8), wins, strict=True)))
    sweep = load([tmp_path / "s"])
    a, b = sweep.trained
    marked = [[at_distance(row, at).straight for at in (0.05, 0.1, 0.2, 0.4, 0.6)] for row in (a, b)]  # type: ignore[union-attr]
    assert marked == [[True, True, True, False, False], [True, False, False, False, False]]
    table = distance_table(sweep, [0.2, 0.6])
    cells = {line["row"]: (line["√KL 0.2"], line["√KL 0.6"]) for line in table_lines(table)}
    assert [cell.endswith("°") for row in (a, b) for cell in cells[row.label]] == [True, False, False, False]
    assert "assumes a straight line from SFT" in table.caption
    assert "straight" not in distance_table(sweep, [0.6]).caption
    differences = distance_difference_table(sweep, compared_at(sweep, a, [WIN], [0.2, 0.6]), a)
    (line,) = table_lines(differences)
    assert [line[at].endswith("°") for at in ("√KL 0.2", "√KL 0.6")] == [True, False]
    assert "assumes a straight line from SFT" in differences.caption


def test_runs_without_a_start_have_no_reach(tmp_path: Path) -> None:
    folder = tmp_path / "s" / "variant-a"
    write_run(folder, "a", 1)
    write_lines(folder / "metrics.jsonl", [{"step": 10, "eval/true_kl": 0.5, WIN: 0.5}])
    sweep = load([tmp_path / "s"])
    assert reach(sweep.trained[0]) == 0
    assert along_distance(sweep.trained[0], WIN) == {}
    assert common_distances(sweep) == []


@pytest.mark.parametrize(
    ("reaches", "expected"),
    [
        ((0.45, 0.62, 1.7), [0.1, 0.2, 0.3, 0.4]),
        ((0.03, 0.9, 1.0), [0.025, 0.2, 0.4, 0.6, 0.8]),
        ((0.5,), []),
    ],
)
def test_the_distances_are_round_and_one_suits_all_rows(
    tmp_path: Path, reaches: Sequence[float], expected: Sequence[float]
) -> None:
    for number, far in enumerate(reaches):
        write_path(tmp_path / "s", f"v{number}", 1, [(0, [0, 0]), (far, [1, 1])])
    sweep = load([tmp_path / "s"])
    assert common_distances(sweep) == pytest.approx(expected)
    asked = Sweep(sweep.runs, sweep.rows, (), {"distances": [0.3, 0.1]}, depth=sweep.depth)
    assert common_distances(asked) == [0.1, 0.3]


def table_lines(table: Any) -> list[Mapping[str, str]]:
    return [dict(zip(table.header, texts, strict=True)) for texts in table.texts()]


def test_the_tables_have_intervals_over_pipelines_and_pair_them(tmp_path: Path) -> None:
    folder = write_pipelines(tmp_path / "s", variants=["lora_kl", "lora_none", "full_none"], replicates=(1, 2, 3, 4, 5))
    sweep = load([folder])
    against, distances = baseline(sweep), common_distances(sweep)
    lines = table_lines(distance_table(sweep, distances))
    assert [line["metric"] for line in lines[::3]] == ["win rate (%)", "gold utility", "factual precision (%)"]
    near = next(row for row in sweep.trained if "lora_kl" in row.label)
    line = next(line for line in lines if line["row"] == near.label)
    assert line["√KL 0.8"] == "–"  # KL 0.3 is as far as this variant goes
    here = at_distance(near, 0.4)
    assert here is not None
    assert line["√KL 0.4"].startswith(f"{100 * np.mean(here.values(WIN)):.1f} (")
    found = compared_at(sweep, against, [WIN], distances)
    here, other = (at_distance(row, 0.2) for row in (sweep.trained[1], against))
    assert here is not None
    assert other is not None
    alone = compare(here, other, WIN, pair=True)
    assert alone is not None
    assert alone.unpaired is not None
    assert alone.difference == found[0.2][0].difference
    table = distance_difference_table(sweep, found, against)
    assert f"all {sum(map(len, found.values()))} comparisons" in table.caption
    assert all(row.label != against.label for row in sweep.trained if row.label in {line[0] for line in table.texts()})
    assert table.csv().splitlines()[0].startswith("row,√KL 0.2,√KL 0.2 low,√KL 0.2 high")


def test_rows_are_compared_at_equal_distance_in_the_metrics_in_which_they_are_compared_at_equal_steps(
    tmp_path: Path,
) -> None:
    """As in a study whose columns are the reward and the gold utility: over-optimisation shows in the second."""
    columns = ["eval/reward", "eval/gold_utility", "eval/true_kl"]
    out = make_report([write_pipelines(tmp_path / "s", {"columns": columns})]).parent
    at_steps, means, differences = (
        [dict(line) for line in csv.DictReader((out / f"{name}.csv").open())]
        for name in ("gains", "distance", "distance_differences")
    )
    assert {line["metric"] for line in at_steps} == {"reward", "gold utility"}
    assert [line["metric"] for line in differences] == ["reward", "gold utility"]
    assert {"reward", "gold utility"} < {line["metric"] for line in means}
    family = (out / "distance_differences.md").read_text()
    held = [float(line[key]) for line in differences for key in line if key.startswith("√KL") and line[key] != ""]
    assert f"all {len(held) // 3} comparisons" in family
    sweep = load([tmp_path / "s"])
    ours, theirs = (at_distance(row, 0.2) for row in sweep.trained[::-1])
    assert ours is not None
    assert theirs is not None
    gap = compare(ours, theirs, "eval/gold_utility", pair=True)
    assert gap is not None
    assert float(differences[1]["√KL 0.2"]) == pytest.approx(gap.difference.mean)


@pytest.mark.parametrize("between", [[], [(0.2, [0.0] * 30)]], ids=["straight", "evaluated before"])
def test_the_summary_names_the_best_row_where_all_rows_got_to(
    tmp_path: Path, between: list[tuple[float, list[float]]]
) -> None:
    """It says so where “far” has no evaluation but that of SFT up to there."""
    for replicate in (1, 2, 3):
        bad, good = [0.0] * 30, [1.0] * 30
        write_path(tmp_path / "s", "near", replicate, [(0, bad), (0.4, [*good[:27], 0, 0, replicate % 2])])
        write_path(tmp_path / "s", "far", replicate, [(0, bad), *between, (0.8, [*good[:29], replicate % 2])])
    sweep = load([tmp_path / "s"])
    told = " ".join(findings(sweep, [], WIN))
    assert (
        "At equal distance from SFT (√KL 0.4, the farthest of the table's that all rows reach), “variant=near”" in told
    )
    assert "has the highest win rate, 92.2 %. The only other row, “variant=far”, is significantly lower." in told
    assert ("This assumes that runs go there in a straight line from SFT" in told) is (not between)


def test_the_figure_draws_what_the_rows_have_at_each_distance(tmp_path: Path) -> None:
    figure = {"name": "far", "kind": "distance", "y": [WIN, "eval/gold_utility"]}
    folder = write_pipelines(tmp_path / "s", {"figures": [figure]})
    drawn = (make_report([folder]).parent / "figures" / "far.csv").read_text().splitlines()
    assert drawn[0].split(",")[:3] == ["row", "sqrt_true_kl", WIN]
    first = load([folder]).trained[0]
    last = [line for line in drawn if line.startswith(f"{first.label},")][39].split(",")
    here = at_distance(first, reach(first))
    assert here is not None
    assert (float(last[1]), float(last[2])) == pytest.approx((reach(first), 100 * np.mean(here.values(WIN))))
    assert math.isfinite(float(last[3]))
