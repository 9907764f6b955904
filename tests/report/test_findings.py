"""The sentences at the top of a report: what may be said of the row that turned out best.

pytest -n0 -s tests/report/test_findings.py
"""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from rlhf.report import statistics as st
from rlhf.report.findings import findings
from rlhf.report.runs import load
from tests.helpers.made_up_sweeps import write_pipelines

WIN = "eval/win_rate"


def test_the_best_row_is_compared_with_the_others_as_one_of_all_pairs(tmp_path: Path) -> None:
    folder = write_pipelines(tmp_path / "s", variants=["lora_kl", "lora_none", "full_none"], replicates=(1, 2, 3, 4, 5))
    told = " ".join(findings(load([folder]), [], WIN))
    assert "Highest win rate: “variant=full_none”" in told
    assert (
        "Of the 3 other rows, 3 (“SFT”, “variant=lora_kl”, “variant=lora_none”) can be distinguished as lower" in told
    )
    assert "Holm's correction for all 6 pairs of rows" in told


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
