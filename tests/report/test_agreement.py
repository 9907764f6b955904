"""Accuracy and Cohen's κ of two judges, by hand and by simulation."""

import math

import numpy as np
import pytest

from rlhf.report.agreement import agreement, share_interval


def pairs(table: list[list[int]], values: tuple[float, ...]) -> tuple[list[float], list[float]]:
    """The outcomes of two judges whose verdicts have these counts."""
    first, second = [], []
    for a, row in zip(values, table, strict=True):
        for b, count in zip(values, row, strict=True):
            first += [a] * count
            second += [b] * count
    return first, second


def test_accuracy_and_kappa_by_hand() -> None:
    """20 + 15 of 50 agree: 0.7. By chance 0.5 · 0.6 + 0.5 · 0.4 = 0.5 would. κ = (0.7 − 0.5) / (1 − 0.5) = 0.4."""
    first, second = pairs([[20, 5], [10, 15]], (1.0, 0.0))
    found = agreement(first, second, [str(i) for i in range(50)])
    assert found.pairs == 50
    assert found.accuracy[0] == pytest.approx(0.7)
    assert found.decided == found.accuracy
    assert found.kappa[0] == pytest.approx(0.4)
    assert found.kappa[1] < 0.4 < found.kappa[2]
    # Wilson: (0.7 + 3.8415 / 100) / 1.07683 ± 1.95996 / 1.07683 · √(0.21 / 50 + 3.8415 / 10000)
    assert found.accuracy[1:] == pytest.approx((0.56249, 0.80895), abs=2e-3)


def test_a_tie_is_a_verdict_of_its_own() -> None:
    """3 × 3 counts: 10 + 4 + 6 of 30 agree; chance is (13·15 + 9·7 + 8·8) / 900."""
    first, second = pairs([[10, 2, 1], [4, 4, 1], [1, 1, 6]], (1.0, 0.5, 0.0))
    found = agreement(first, second, [str(i) for i in range(30)])
    chance = (13 * 15 + 9 * 7 + 8 * 8) / 900
    assert found.accuracy[0] == pytest.approx(20 / 30)
    assert found.kappa[0] == pytest.approx((20 / 30 - chance) / (1 - chance))
    assert found.ties == (9, 7)
    assert found.decided[0] == pytest.approx(16 / 18)


def test_votes_in_between_count_by_their_side_and_missing_verdicts_are_left_out() -> None:
    found = agreement([0.75, 0.25, None, 1.0], [1.0, 0.0, 1.0, None], list("abcd"))
    assert (found.pairs, found.unjudged, found.accuracy[0], found.kappa[0]) == (2, 2, 1.0, 1.0)
    nothing = agreement([None], [1.0], ["a"])
    assert nothing.pairs == 0
    assert math.isnan(nothing.kappa[0])


def test_one_verdict_alone_has_no_kappa() -> None:
    found = agreement([1.0] * 5, [1.0] * 5, list("abcde"))
    assert found.accuracy[0] == 1.0
    assert found.accuracy[1] == pytest.approx(5 / (5 + 3.8415), abs=1e-4)  # Wilson's interval has a width
    assert math.isnan(found.kappa[0])


def test_pairs_of_one_instruction_do_not_count_as_independent() -> None:
    """If each pair is there four times, the intervals are those of a single copy."""
    first, second = pairs([[20, 5], [10, 15]], (1.0, 0.0))
    once = agreement(first, second, [str(i) for i in range(50)])
    four = agreement(first * 4, second * 4, [str(i) for i in range(50)] * 4)
    assert four.accuracy == pytest.approx(once.accuracy, abs=2e-3)
    assert four.kappa == pytest.approx(once.kappa, abs=0.02)
    apart = agreement(first * 4, second * 4, [str(i) for i in range(200)])
    assert apart.accuracy[2] - apart.accuracy[1] < 0.6 * (four.accuracy[2] - four.accuracy[1])


def test_intervals_hold_the_truth_with_several_pairs_per_instruction() -> None:
    """Judges that agree on some instructions more than on others: 40 of them, with 5 pairs each."""
    rng, held = np.random.default_rng(0), []
    groups = np.repeat(np.arange(40), 5)
    for _ in range(2000):
        chance = rng.beta(4, 2, 40)[groups]
        _, low, high = share_interval((rng.random(200) < chance).astype(float), groups)
        held.append(low <= 4 / 6 <= high)
    print(f"{np.mean(held):.3f}")
    assert 0.93 <= np.mean(held) <= 0.97


def test_intervals_of_kappa_hold_the_truth() -> None:
    """Two judges with independent noise: each tells the truth in 85 % of cases. κ = 2 (0.85² + 0.15²) − 1 = 0.49."""
    rng, held = np.random.default_rng(0), []
    for _ in range(1000):
        truth = rng.random(150) < 0.5
        a, b = (np.where(rng.random(150) < 0.85, truth, ~truth).astype(float) for _ in range(2))
        _, low, high = agreement(a.tolist(), b.tolist(), [str(i) for i in range(150)], resamples=200).kappa
        held.append(low <= 0.49 <= high)
    print(f"{np.mean(held):.3f}")
    assert 0.925 <= np.mean(held) <= 0.97
