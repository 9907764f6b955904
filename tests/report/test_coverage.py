"""How often the report's 95 % intervals hold the truth, by simulation; docs/statistics.md shows the printed table.

pytest -n0 -s tests/report/test_coverage.py
"""

import math

import numpy as np
import pytest
from scipy.special import ndtr

from rlhf.report import statistics as st

TRIALS, PROMPTS = 4000, 200
# Standard deviations of the effects on a probit scale. 0.4 is about 15 points of win rate, as between the reward models
# of the farm; HARD is that of an instruction in all rows, QUIRK that of an instruction in one row.
SHARED, OWN, PPO, HARD, QUIRK = 0.4, 0.15, 0.2, 0.8, 0.3
LEVELS = {"a": 0.0, "b": -0.3}
TOTAL = math.sqrt(1 + SHARED**2 + OWN**2 + PPO**2 + HARD**2 + QUIRK**2)
TRUTH = {row: float(ndtr(level / TOTAL)) for row, level in LEVELS.items()}
KINDS = ("a row's mean", "difference, paired", "difference, unpaired", "difference of other pipelines")
WRONG = ("PPO seeds of one pipeline", "runs of pipelines with two PPO seeds each")
# replicates → what was measured, with an error of 0.3 points where it is near 95 %
EXPECTED = {
    3: (0.952, 0.953, 0.992, 0.968, 0.682, 0.840),
    5: (0.951, 0.955, 0.999, 0.954, 0.462, 0.864),
    10: (0.947, 0.951, 0.999, 0.952, 0.348, 0.871),
}


def draw(rng: np.random.Generator, pipelines: int, seeds: int, difficulty: dict[str, st.Array]) -> dict[str, st.Array]:
    """[pipelines, seeds, prompts]: the wins of both rows, whose SFT and reward models are the same."""
    shared, made = rng.normal(0, SHARED, (pipelines, 1, 1)), {}
    for row, level in LEVELS.items():
        luck = shared + rng.normal(0, OWN, (pipelines, 1, 1)) + rng.normal(0, PPO, (pipelines, seeds, 1))
        chance = ndtr(level + luck + difficulty[row])
        made[row] = (rng.random(chance.shape) < chance).astype(float)
    return made


def holds(told: st.Estimate, truth: float) -> bool:
    return told.low <= truth <= told.high


def hits(rng: np.random.Generator, count: int) -> list[bool]:
    """Whether each kind of interval, and each wrong one, holds the truth in one trial with `count` replicates."""
    hard = rng.normal(0, HARD, PROMPTS)
    difficulty = {row: hard + rng.normal(0, QUIRK, PROMPTS) for row in LEVELS}
    nested, others, single = (draw(rng, *sizes, difficulty) for sizes in ((count, 2), (count, 1), (1, count)))
    a, b = (nested[row].mean(axis=1) for row in "ab")
    gap = TRUTH["a"] - TRUTH["b"]
    return [
        holds(st.mean_of(a), TRUTH["a"]),
        holds(st.difference(a, b, paired=True), gap),
        holds(st.difference(a, b, paired=False), gap),
        holds(st.difference(a, others["b"].mean(axis=1), paired=False), gap),
        holds(st.mean_of(single["a"][0]), TRUTH["a"]),
        holds(st.mean_of(nested["a"].reshape(-1, PROMPTS)), TRUTH["a"]),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("count", EXPECTED)
def test_intervals_hold_the_truth_as_often_as_the_documentation_says(count: int) -> None:
    rng = np.random.default_rng(count)
    found = np.mean([hits(rng, count) for _ in range(TRIALS)], axis=0)
    print(f"\n{count} replicates:", *(f"{name} {100 * share:.1f} %;" for name, share in
                                      zip((*KINDS, *WRONG), found, strict=True)))  # fmt: skip
    assert found == pytest.approx(EXPECTED[count], abs=0.015)
