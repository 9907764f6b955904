"""The sentences at the top of a report: what may be said of the row that turned out best.

pytest -n0 -s tests/report/test_findings.py
"""

import json
import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from rlhf.report import statistics as st
from rlhf.report.comparisons import comparisons, origins
from rlhf.report.findings import _against, findings
from rlhf.report.runs import load
from rlhf.tracking.reading import ADJUSTED
from tests.helpers.made_up_sweeps import write_pipelines, write_run, write_sweep

WIN = "eval/win_rate"


def told(folder: Path, metric: str = WIN) -> str:
    """The sentences about the runs of a sweep, as `rlhf-report` makes them."""
    sweep = load([folder])
    compared = [item for row in origins(sweep) for item in comparisons(sweep, row, [metric])]
    return " ".join(findings(sweep, compared, metric))


def test_the_best_row_is_compared_with_the_others_as_one_of_all_pairs(tmp_path: Path) -> None:
    folder = write_pipelines(tmp_path / "s", variants=["lora_kl", "lora_none", "full_none"], replicates=(1, 2, 3, 4, 5))
    text = told(folder)
    assert "“variant=full_none” has the highest mean win rate, 58.0 % (SFT: 26.3 %). All other 3 rows are" in text
    assert "significantly lower (Holm's correction for all 6 pairs of rows, as the best was picked afterwards)." in text
    assert (
        "Against SFT (3 comparisons, Holm's correction), win rate is significantly higher for “variant=full_none”"
        in text
    )
    assert "baseline" not in text  # the layout names none


def test_a_single_row_is_compared_with_sft_and_with_nothing_else(tmp_path: Path) -> None:
    text = told(write_run_of(tmp_path / "s", "lora_none", 1))
    assert re.search(
        r"“PPO” has a mean win rate of \d\d\.\d % \(SFT: \d\d\.\d %\)\. Against SFT, it is at \+\d+\.\d points in"
        r" win rate \(95 % interval [+−]\d+\.\d to \+\d+\.\d\): the difference is (not )?significant\.",
        text,
    )
    assert "Each row has one seed" in text
    assert "1 of 1 run is finished." in text
    assert "Holm" not in text
    assert "other row" not in text


def test_of_two_rows_with_a_baseline_each_is_named_once(tmp_path: Path) -> None:
    folder = write_pipelines(tmp_path / "s", {"baseline": "lora_kl"}, ["lora_kl", "full_none"], (1, 2, 3, 4, 5))
    text = told(folder)
    assert "Against SFT (2 comparisons, Holm's correction)" in text
    assert "Against the baseline “variant=lora_kl”, “variant=full_none” is at +" in text
    assert "“SFT” is" not in text  # rows are compared with SFT, not SFT with them


def test_what_would_differ_without_the_correction_is_said(tmp_path: Path) -> None:
    sweep = load([write_pipelines(tmp_path / "s", variants=["lora_none", "full_none"], replicates=(1, 2, 3, 4, 5))])
    full, lora = comparisons(sweep, sweep.rows[0], [WIN])
    items = [full, replace(lora, difference=full.difference)]  # each by itself significantly above SFT

    def last(*stand: bool) -> str:
        found = [replace(item, stands=stands) for item, stands in zip(items, stand, strict=True)]
        (text,) = _against(sweep, found, len(items))
        return text.partition(" Without the correction, ")[2]

    assert last(True, True) == ""
    assert last(True, False) == "“variant=lora_none” would differ as well."
    assert last(False, False) == "“variant=full_none” and “variant=lora_none” would differ."


def test_many_rows_are_counted_and_not_all_listed(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    variants = [f"v{number}" for number in range(9)]
    for variant in variants:
        write_run(folder / variant, variant, 1, luck=0.3)
    start = "Against SFT (9 comparisons, Holm's correction), win rate is significantly higher for "
    sentence = told(folder).partition(start)[2].partition(". ")[0]
    assert sentence.endswith("and 4 more")
    assert sentence.count("“") == 5


def test_a_run_that_diverged_is_never_the_best(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", variants=["lora_kl", "full_none"])
    path = folder / "variant-full_none_seed-2" / "summary.json"
    path.write_text(re.sub(r'"eval/win_rate": [\d.]+', '"eval/win_rate": NaN', path.read_text(), count=1))
    text = told(folder)
    assert "“variant=lora_kl” has the highest mean win rate" in text
    assert "“variant=full_none” has no finite win rate" in text
    assert "nan" not in text


def test_a_row_that_wins_by_length_is_named(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", variants=["lora_kl", "full_none"])
    for path in folder.glob("*/summary.json"):
        summary = json.loads(path.read_text())
        summary["metrics"][ADJUSTED] = 0.1 if "full_none" in path.parent.name else 0.4
        summary["sft_metrics"][ADJUSTED] = 0.3
        path.write_text(json.dumps(summary))
    text = told(folder)
    assert "By the length-adjusted win rate another row has the highest mean: “variant=lora_kl” (40.0 %)" in text
    assert "below it in the mean length-adjusted win rate: “variant=full_none” (+" in text
    assert "and −20.0 points)" in text


def write_run_of(folder: Path, variant: str, seed: int) -> Path:
    """A folder with a single run, without overrides."""
    write_run(folder / "default", variant, seed, overrides=[])
    return folder


@pytest.mark.slow
def test_of_equal_rows_none_is_called_lower_than_the_best_more_often_than_in_one_study_of_twenty() -> None:
    """The best of eight equal rows is picked afterwards; a correction for its seven comparisons alone is not enough."""
    rng, rows, pipelines, prompts = np.random.default_rng(0), 8, 10, 60
    alone, all_pairs = [], []
    for _ in range(200):
        hard, shared = rng.normal(0, 0.8, prompts), rng.normal(0, 0.4, (pipelines, 1))
        made = []
        for _ in range(rows):
            chance = hard + rng.normal(0, 0.3, prompts) + shared + rng.normal(0, 0.25, (pipelines, 1))
            made.append((rng.random(chance.shape) < stats.norm.cdf(chance)).astype(float))
        made.sort(key=lambda outcomes: -outcomes.mean())
        against_best = [st.difference(row, made[0], paired=True).p_value for row in made[1:]]
        others = [st.difference(*pair, paired=True).p_value for pair in combinations(made[1:], 2)]
        alone.append(any(st.holm(against_best)))
        all_pairs.append(any(st.holm([*against_best, *others])[: rows - 1]))
    print(f"\nfalsely lower: {100 * np.mean(alone):.1f} % of studies, {100 * np.mean(all_pairs):.1f} % for all pairs")
    assert np.mean(alone) > 0.06 > np.mean(all_pairs)
