"""Statistics for comparing configurations by a few replicates on a few hundred evaluation instructions.

Outcomes are matrices [replicates, prompts]: one number per replicate and evaluation instruction, with the instructions
in the same order everywhere. Both are samples: another replicate gives another policy, another instruction gives
another comparison. Therefore the mean of a matrix has the variance

    σ_replicate² / n  +  σ_prompt² / m  +  σ_residual² / (n m)

for n replicates and m prompts. A standard error that accounts only for the prompts, as published win rates do, or only
for the replicates is too small. The three are estimated by the mean squares of the two-way analysis of variance.

What a replicate is, the caller decides (`rlhf.report.runs`): a whole pipeline, or less if its upper stages are shared.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq  # type: ignore[import-untyped]

# stdtr, stdtrit: CDF and quantiles of Student's t; chdtri: quantiles of chi-square by the upper tail
from scipy.special import chdtri, stdtr, stdtrit  # type: ignore[import-untyped]

Array = NDArray[np.float64]
Verdict = Literal["higher", "lower", "not distinguishable"]
POWER = 0.8
LEVEL = 0.05  # of significance, two-sided
SMALLEST_P = 1e-12  # p-values below this are not told apart
MANY_REPLICATES = 1000  # above this Student's t is taken for a normal distribution
RANGE_LEVEL = 0.8  # how often the range of replicates needed covers what the true variance over them would require


def replicate_error(values: Sequence[float] | Array) -> float:
    """Standard error of the mean of values [replicates]; NaN for fewer than two."""
    return _error(np.asarray(values, float))


def judge_error(outcomes: Array) -> float:
    """Standard error of the mean of outcomes [replicates, prompts] that is due to the finite set of instructions.

    NaN for fewer than two instructions.
    """
    return _error(outcomes.mean(axis=0))


def covered(replicates: int, errors: float) -> float:
    """How often a mean over `replicates` ± `errors` standard errors covers the true mean (Student's t)."""
    return float(2 * stdtr(replicates - 1, errors) - 1)


def errors_for(replicates: int, level: float = 1 - LEVEL) -> float:
    """How many standard errors on either side of a mean over `replicates` cover the true mean in `level` of cases."""
    return float(stdtrit(replicates - 1, (1 + level) / 2))


def deviation_range(freedom: float, level: float = 1 - LEVEL) -> tuple[float, float]:
    """The interval of a standard deviation, in units of its estimate with these degrees of freedom (chi-square)."""
    low, high = (math.sqrt(freedom / float(chdtri(freedom, (1 - sign * level) / 2))) for sign in (1, -1))
    return low, high


@dataclass(frozen=True)
class Components:
    """The variance of a mean or of a difference of means, by source.

    Attributes:
        replicates: (variance, number of replicates) of each group that varies together: one if paired, else two.
        prompts: the variance due to the prompts.
        prompt_count: the number of prompts.
        residual: for each of the groups, the variance due to the interaction of replicates and prompts.
    """

    replicates: tuple[tuple[float, int], ...]
    prompts: float
    prompt_count: int
    residual: tuple[float, ...]

    @property
    def total(self) -> float:
        """Variance of the mean or difference.

        The variance over replicates and the variance over prompts both include the residual, so it is subtracted once.
        The total is at least as large as either of them.
        """
        replicates = sum(variance for variance, _ in self.replicates)
        return max(replicates + self.prompts - sum(self.residual), replicates, self.prompts)

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the variance over replicates (Welch & Satterthwaite); infinite if there is none."""
        spread = sum(variance**2 / (count - 1) for variance, count in self.replicates)
        return sum(variance for variance, _ in self.replicates) ** 2 / spread if spread else math.inf

    def half_width(self, level: float) -> float:
        """Half of the interval that misses the true mean or difference with probability `level`.

        Each source has a quantile of Student's t of its own, and the squares add up (Howe 1974). With a single quantile
        for the sum (Satterthwaite 1946), intervals are too narrow just when a few replicates happen to agree.
        """
        replicates, prompts = (
            float(stdtrit(freedom, 1 - level / 2)) for freedom in (self.freedom, self.prompt_count - 1)
        )
        remaining = max(self.prompts - sum(self.residual), 0.0)
        squared = replicates**2 * sum(variance for variance, _ in self.replicates) + prompts**2 * remaining
        return math.sqrt(max(squared, prompts**2 * self.prompts))


@dataclass(frozen=True)
class Estimate:
    """A mean or a difference of means, its standard error, 95 % interval and two-sided p-value against 0."""

    mean: float
    error: float
    low: float
    high: float
    p_value: float

    @property
    def verdict(self) -> Verdict:
        """Whether it is higher or lower than 0, or neither at the 5 % level."""
        if not self.p_value < LEVEL:
            return "not distinguishable"
        return "higher" if self.mean > 0 else "lower"


def components(a: Array, b: Array, paired: bool) -> Components:
    """The sources of variance of mean(a) - mean(b).

    A matrix with a single replicate, such as that of a common SFT model, is treated as fixed: its variance over
    replicates is unknown.

    Args:
        a: [replicates, prompts].
        b: [replicates, prompts] on the same prompts; the number of replicates may differ from that of a unless
            `paired`.
        paired: whether replicate i of a and replicate i of b have models or luck in common.
    """
    prompts = a.shape[1]
    replicates, residual = [], []
    for group in [a - b] if paired else [a, b]:
        count = len(group)
        if count < 2:
            continue
        # without the effects of replicates and prompts: what remains is their interaction
        rest = group - group.mean(axis=1, keepdims=True) - group.mean(axis=0) + group.mean()
        replicates.append((_error(group.mean(axis=1)) ** 2, count))
        residual.append(float((rest**2).sum()) / ((count - 1) * (prompts - 1)) / (count * prompts))
    of_prompts = _error(a.mean(axis=0) - b.mean(axis=0)) ** 2
    return Components(tuple(replicates), of_prompts, prompts, tuple(residual))


def difference(a: Array, b: Array, paired: bool) -> Estimate:
    """Compare the outcomes of two rows on the same prompts; the arguments are those of `components`.

    How often its intervals hold the true difference is measured in `tests/report/test_coverage.py`.
    """
    parts = components(a, b, paired)
    mean, error = float(a.mean() - b.mean()), math.sqrt(parts.total)
    if error < 1e-12:
        return Estimate(mean, 0.0, mean, mean, 1.0 if abs(mean) < 1e-12 else 0.0)
    half = parts.half_width(LEVEL)
    return Estimate(mean, error, mean - half, mean + half, _p_value(parts, abs(mean)))


def mean_of(outcomes: Array) -> Estimate:
    """The mean of outcomes [replicates, prompts] with an interval that counts both as samples."""
    return difference(outcomes, np.zeros((1, outcomes.shape[1])), paired=False)


@dataclass(frozen=True)
class Need:
    """What would make the observed difference significant: replicates per row and, if they cannot, instructions.

    `replicates` is the estimate. `fewest` to `most` is its 80 % confidence interval with regard to the variance over
    replicates, which a few of them estimate poorly. `instructions` is None if the present number is enough.
    """

    replicates: int
    fewest: int
    most: int
    instructions: int | None = None


def replicates_needed(a: Array, b: Array, paired: bool, power: float = POWER) -> Need | None:
    """How many replicates per row would make the observed difference significant at 5 % (two-sided) with this power.

    n = z² s² / (d² - z² v), with the variance s² per replicate and the instructions' variance v of the difference d. If
    z² v alone exceeds d², no number of replicates is enough: then instructions and replicates share the allowed
    variance equally. For few replicates, quantiles of Student's t replace z, as in `difference`.

    Returns:
        None if no row has two replicates, or if the means are equal.
    """
    parts, gap = components(a, b, paired), abs(float(a.mean() - b.mean()))
    if not parts.replicates or not gap > 1e-12:
        return None
    prompts = max(parts.prompts - sum(parts.residual), 0.0)
    # the rows may have different numbers of replicates now, but the answer is one number for both
    single = sum(count * variance for variance, count in parts.replicates)
    allowed = (gap / _quantiles(math.inf, power)) ** 2
    enough = allowed > prompts
    share = allowed - prompts if enough else allowed / 2
    variances = (single, *_variance_range(single, parts.replicates))
    estimate, fewest, most = (_count_for(variance, share, len(parts.replicates), power) for variance in variances)
    return Need(estimate, fewest, most, None if enough else math.ceil(2 * prompts / allowed * parts.prompt_count))


def _p_value(parts: Components, gap: float) -> float:
    """The level whose interval around `gap` just reaches 0."""
    if math.isnan(gap) or gap >= parts.half_width(SMALLEST_P):
        return gap if math.isnan(gap) else SMALLEST_P
    return float(brentq(lambda level: parts.half_width(level) - gap, SMALLEST_P, 1.0))


def _error(values: Array) -> float:
    """Standard error of the mean of independent values; NaN for fewer than two."""
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _variance_range(single: float, groups: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """The 80 % confidence interval of the variance per replicate: chi-square with Satterthwaite's freedom."""
    spread = sum((count * variance) ** 2 / (count - 1) for variance, count in groups)
    if not spread:
        return single, single
    freedom, tail = single**2 / spread, (1 - RANGE_LEVEL) / 2
    low, high = (freedom * single / float(chdtri(freedom, level)) for level in (tail, 1 - tail))
    return low, high


def _count_for(single: float, allowed: float, groups: int, power: float) -> int:
    """The smallest number of replicates whose mean has at most the allowed variance, given their freedom."""
    normal = _quantiles(math.inf, power)
    count = max(2, math.ceil(single / allowed))
    # with fewer degrees of freedom the quantiles are larger, so that less variance is allowed
    while (
        count < MANY_REPLICATES and single / count * (_quantiles(groups * (count - 1), power) / normal) ** 2 > allowed
    ):
        count += 1
    return count


def _quantiles(freedom: float, power: float) -> float:
    """The quantiles of Student's t for LEVEL and power, added: 1.96 + 0.84 for many degrees of freedom and 80 %."""
    return float(stdtrit(freedom, 1 - LEVEL / 2) + stdtrit(freedom, power))


def holm(p_values: Sequence[float]) -> list[bool]:
    """Which comparisons are significant at a family-wise level of 5 % (Holm 1979); NaN is never significant."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    significant = [False] * len(p_values)
    for rank, i in enumerate(order):
        if not p_values[i] < LEVEL / (len(order) - rank):
            break
        significant[i] = True
    return significant
