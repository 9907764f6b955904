"""The report's statistics against closed forms and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from rlhf.report import statistics as st
from rlhf.report.linear_range import initial_line


def draw(
    rng: np.random.Generator, seeds: int, prompts: int, seed_sd: float, row_sd: float, gap: float, hard: st.Array
) -> st.Array:
    """Simulated wins [seeds, prompts] of a row: a probit model with effects of prompts (`hard`), row, and seeds."""
    own, luck = rng.normal(0, row_sd, prompts), rng.normal(0, seed_sd, (seeds, 1))
    return (rng.random((seeds, prompts)) < stats.norm.cdf(gap - 0.4 + hard + own + luck)).astype(float)


def draw_two(
    rng: np.random.Generator, seeds: int, prompts: int, seed_sd: float, row_sd: float, gap: float
) -> tuple[st.Array, st.Array]:
    """Simulated wins of two rows on the same prompts."""
    hard = rng.normal(0, 0.8, prompts)
    first, second = (draw(rng, seeds, prompts, seed_sd, row_sd, level, hard) for level in (gap, 0.0))
    return first, second


# paired, seeds and seed effects (sd) of each row, sd of row × prompt effects, true coverage of the 95 % intervals
REGIMES = [
    (True, (3, 3), (0.05, 0.05), 0.5, 0.981),
    (True, (3, 3), (0.2, 0.2), 0.2, 0.961),
    (True, (2, 2), (0.1, 0.1), 0.2, 0.979),
    (False, (3, 3), (0.1, 0.1), 0.2, 0.970),
    (False, (3, 3), (0.3, 0.05), 0.2, 0.951),
    (False, (3, 12), (0.05, 0.2), 0.2, 0.954),
    (False, (3, 12), (0.2, 0.05), 0.2, 0.939),
]


@pytest.mark.parametrize(("paired", "seeds", "spread", "row_sd", "expected"), REGIMES)
def test_intervals_have_their_stated_coverage(
    paired: bool, seeds: tuple[int, int], spread: tuple[float, float], row_sd: float, expected: float
) -> None:
    """Coverage for each regime: an average over regimes would hide the lowest."""
    rng, hits, prompt_hits = np.random.default_rng(11), [], []
    levels = [
        level / math.sqrt(1 + 0.8**2 + sd**2 + row_sd**2) for level, sd in zip((-0.25, -0.4), spread, strict=True)
    ]
    truth = float(np.subtract(*stats.norm.cdf(levels)))
    for _ in range(1500):
        a, b = (
            draw(rng, count, 200, sd, row_sd, gap, hard)
            for hard in [rng.normal(0, 0.8, 200)]
            for count, sd, gap in zip(seeds, spread, (0.15, 0.0), strict=True)
        )
        told = st.difference(a, b, paired)
        hits.append(told.low <= truth <= told.high)
        if paired:
            prompt_hits.append(abs(told.mean - truth) <= 1.96 * st.judge_error(a - b))
    assert abs(np.mean(hits) - expected) <= 0.02
    # intervals from the instructions alone would be too narrow
    assert spread[0] < 0.1 or not paired or np.mean(prompt_hits) < 0.93


def test_the_range_of_replicates_needed_holds_the_truth_as_often_as_it_says() -> None:
    """The gap is fixed at its true value, so that only the variance has to be estimated."""
    rng, truth, hits = np.random.default_rng(4), (1.96 + 0.84) ** 2 * (0.03**2 + 0.05**2) / 0.05**2, []
    for _ in range(300):
        a, b = (
            np.repeat((luck - luck.mean()) + level, 30).reshape(-1, 30)
            for luck, level in ((rng.normal(0, 0.03, 3), 0.55), (rng.normal(0, 0.05, 3), 0.5))
        )
        need = st.replicates_needed(a, b, paired=False)
        assert need is not None
        assert need.fewest <= need.replicates <= need.most
        hits.append(need.fewest - 2 <= truth <= need.most)
    assert 0.75 <= np.mean(hits) <= 0.9


def test_no_difference_is_rarely_claimed() -> None:
    rng = np.random.default_rng(3)
    claims = [st.difference(*draw_two(rng, 3, 200, 0.1, 0.3, 0.0), True).verdict for _ in range(200)]
    assert 1 - claims.count("not distinguishable") / 200 <= 0.07


def test_replicate_error_is_that_of_the_mean() -> None:
    values = [0.31, 0.36, 0.40, 0.33]
    assert st.replicate_error(values) == pytest.approx(np.std(values, ddof=1) / 2)
    assert math.isnan(st.replicate_error([0.3]))


def test_judge_error_is_that_of_a_mean_over_prompts() -> None:
    outcomes = np.random.default_rng(0).integers(0, 2, (3, 200)).astype(float)
    expected = outcomes.mean(axis=0).std(ddof=1) / math.sqrt(200)
    assert st.judge_error(outcomes) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("paired", [True, False])
def test_components_are_those_of_the_analysis_of_variance(paired: bool) -> None:
    a, b = draw_two(np.random.default_rng(5), 6, 80, 0.5, 0.5, 0.3)
    found = st.components(a, b, paired)
    for group, (seeds, count), residual in zip(
        [a - b] if paired else [a, b], found.replicates, found.residual, strict=True
    ):
        rest = group - group.mean(1, keepdims=True) - group.mean(0) + group.mean()
        assert count == 6
        assert seeds == pytest.approx(group.mean(axis=1).var(ddof=1) / 6)
        assert residual == pytest.approx((rest**2).sum() / (5 * 79) / (6 * 80))
    assert found.prompts == pytest.approx((a - b).mean(axis=0).var(ddof=1) / 80)


def test_without_prompt_effects_the_interval_is_students() -> None:
    a = np.repeat([[0.5], [0.6], [0.4]], 50, axis=1)
    b = np.repeat([[0.3], [0.35], [0.31]], 50, axis=1)
    told = st.difference(a, b, paired=True)
    theirs = stats.ttest_rel(a[:, 0], b[:, 0])
    assert told.p_value == pytest.approx(theirs.pvalue, abs=0.003)
    assert told.low == pytest.approx(theirs.confidence_interval().low, abs=0.01)
    welch = stats.ttest_ind(a[:, 0], b[:, 0], equal_var=False)
    assert st.difference(a, b, paired=False).p_value == pytest.approx(welch.pvalue, abs=0.003)


def test_one_seed_is_compared_by_its_prompts_alone() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random((1, 60)), rng.random((1, 60)) - 0.5
    told, theirs = st.difference(a, b, paired=False), stats.ttest_rel(a[0], b[0])
    assert told.verdict == "higher"
    assert told.error == pytest.approx((a - b).std(ddof=1) / math.sqrt(60), rel=1e-9)
    assert told.p_value < 1e-6
    assert theirs.pvalue < 1e-6
    assert st.replicates_needed(a, b, paired=False) is None


def test_equal_rows_cannot_be_told_apart() -> None:
    same = np.random.default_rng(0).integers(0, 2, (3, 50)).astype(float)
    assert st.difference(same, same, paired=True) == st.Estimate(0.0, 0.0, 0.0, 0.0, 1.0)
    assert st.replicates_needed(same, same, paired=True) is None


def test_replicates_needed_is_the_formula_and_keeps_its_promise() -> None:
    rng = np.random.default_rng(2)
    luck = rng.normal(0, 0.08, (4, 1)) - 0.02
    a, b = 0.5 + luck + np.zeros((4, 90)), np.full((4, 90), 0.5)
    gap, variance = abs(float((a - b).mean())), float((a - b).mean(axis=1).var(ddof=1))
    need = st.replicates_needed(a, b, paired=True)
    assert need is not None
    assert need.instructions is None
    normal = (1.96 + 0.84) ** 2 * variance / gap**2
    assert normal <= need.replicates <= 1.05 * normal + 3
    made = rng.normal(gap, math.sqrt(variance), (4000, need.replicates))
    power = np.mean(stats.ttest_1samp(made, 0, axis=1).pvalue < 0.05)
    assert 0.76 <= power <= 0.84


def test_replicates_needed_counts_the_seeds_of_each_row_on_its_own() -> None:
    """Three seeds with variance 0.02² against twelve with 0.06²: one run of each adds 0.02² + 0.06² to the variance."""
    rng = np.random.default_rng(0)
    a, b = (
        np.repeat((luck - luck.mean()) / luck.std(ddof=1) * spread + level, 50).reshape(-1, 50)
        for luck, spread, level in ((rng.normal(size=3), 0.02, 0.5), (rng.normal(size=12), 0.06, 0.53))
    )
    need = st.replicates_needed(a, b, paired=False)
    assert need is not None
    exact = (1.96 + 0.84) ** 2 * (0.02**2 + 0.06**2) / 0.03**2
    assert exact == pytest.approx(34.8, abs=0.1)
    assert exact <= need.replicates <= 1.08 * exact + 2
    made = [rng.normal(level, spread, (4000, need.replicates)) for spread, level in ((0.02, 0.5), (0.06, 0.53))]
    assert 0.76 <= np.mean(stats.ttest_ind(*made, axis=1, equal_var=False).pvalue < 0.05) <= 0.84


def test_instructions_are_asked_for_where_seeds_cannot_help() -> None:
    rng = np.random.default_rng(0)
    per_prompt = rng.normal(0, 0.5, 40)
    a = per_prompt - per_prompt.mean() + 0.05 + rng.normal(0, 0.01, (3, 1))
    need = st.replicates_needed(a, np.zeros((3, 40)), paired=True)
    assert need is not None
    assert need.instructions is not None
    variance = per_prompt.var(ddof=1)
    assert need.instructions == pytest.approx(2 * 7.85 * variance / float(a.mean()) ** 2, rel=0.05)


def test_holm_rejects_as_in_hand_computed_examples() -> None:
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert st.holm([0.001, 0.02, math.nan]) == [True, True, False]
    assert st.holm([]) == []


def test_the_initial_straight_line_and_its_end_are_found() -> None:
    rng, at = np.random.default_rng(0), np.arange(0, 13) / 10

    def groups(curve: np.ndarray) -> list[np.ndarray]:
        return [
            np.column_stack([np.full(3, x), y + 0.004 * rng.normal(size=3)]) for x, y in zip(at, curve, strict=True)
        ]

    straight = initial_line(groups(0.2 + 0.5 * at), 0.2)
    assert straight is not None
    assert not straight.bent
    assert straight.slope == pytest.approx(0.5, abs=0.01)
    bent = initial_line(groups(0.2 + 0.5 * np.minimum(at, 0.6)), 0.2)
    assert bent is not None
    assert bent.bent
    assert 0.5 <= bent.end <= 0.8
    assert initial_line(groups(at)[:3], 0.0) is None
