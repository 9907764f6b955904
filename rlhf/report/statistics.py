"""Statistics for comparing configurations by a few seeds on a few hundred evaluation instructions.

Outcomes are matrices [seeds, prompts]: one number per run and evaluation instruction, with the instructions in the same
order in every run. Both are samples: another seed gives another policy, another instruction gives another comparison.
Therefore the mean of a matrix has the variance

    σ_seed² / n  +  σ_prompt² / m  +  σ_residual² / (n m)

for n seeds and m prompts. A standard error that accounts only for the prompts, as published win rates do, or only for
the seeds is too small.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

# stdtr, stdtrit: CDF and quantiles of Student's t; chdtri: quantiles of chi-square by the upper tail
from scipy.special import chdtri, stdtr, stdtrit  # type: ignore[import-untyped]

Array = NDArray[np.float64]
Verdict = Literal["higher", "lower", "not distinguishable"]
DRAWS = 4000  # bootstrap samples
POWER = 0.8
LEVEL = 0.05  # of significance, two-sided
MANY_SEEDS = 1000  # above this Student's t is taken for a normal distribution
RANGE_LEVEL = 0.8  # how often the range of seeds needed covers what the true variance over seeds would require


def seed_error(values: Sequence[float] | Array, draws: int = DRAWS) -> float:
    """Standard error of the mean of values [seeds], by bootstrap; NaN for fewer than two values.

    Resampling n values underestimates their variance by the factor (n - 1) / n, 2/3 for three seeds. The result is
    corrected for this.
    """
    sample = np.asarray(values, float)
    if len(sample) < 2:
        return math.nan
    return math.sqrt(_unbiased(_weights(len(sample), draws, stream=0) @ sample, len(sample)))


def covered(seeds: int, errors: float) -> float:
    """How often a mean over `seeds` seeds ± `errors` standard errors covers the true mean (Student's t)."""
    return float(2 * stdtr(seeds - 1, errors) - 1)


def errors_for(seeds: int, level: float = 1 - LEVEL) -> float:
    """How many standard errors on either side of a mean over `seeds` seeds cover the true mean in `level` of cases."""
    return float(stdtrit(seeds - 1, (1 + level) / 2))


def judge_error(outcomes: Array, draws: int = DRAWS) -> float:
    """Standard error of the mean of outcomes [seeds, prompts] that is due to the finite set of instructions.

    By bootstrap over the instructions; NaN for fewer than two.
    """
    per_prompt = outcomes.mean(axis=0)
    if len(per_prompt) < 2:
        return math.nan
    return math.sqrt(_unbiased(_weights(len(per_prompt), draws, stream=1) @ per_prompt, len(per_prompt)))


@dataclass(frozen=True)
class Components:
    """The variance of a difference of means, by source.

    Attributes:
        seeds: (variance, number of seeds) of each group of runs that are resampled together: one if paired, else two.
        prompts: the variance due to the prompts.
        prompt_count: the number of prompts.
        residual: for each of the groups, the variance due to the interaction of seeds and prompts.
    """

    seeds: tuple[tuple[float, int], ...]
    prompts: float
    prompt_count: int
    residual: tuple[float, ...]

    @property
    def total(self) -> float:
        """Variance of the difference of means.

        The variance over seeds and the variance over prompts both include the residual, so it is subtracted once. The
        total is at least as large as either of them.
        """
        seeds = sum(variance for variance, _ in self.seeds)
        return max(seeds + self.prompts - sum(self.residual), seeds, self.prompts)

    @property
    def freedom(self) -> float:
        """Degrees of freedom of `total` (Satterthwaite 1946): few if the variance over a few seeds dominates."""
        spread = self.prompts**2 / (self.prompt_count - 1)
        for (seeds, count), residual in zip(self.seeds, self.residual, strict=True):
            spread += seeds**2 / (count - 1) + residual**2 / ((count - 1) * (self.prompt_count - 1))
        return self.total**2 / spread if spread else math.inf


@dataclass(frozen=True)
class Difference:
    """mean(a) - mean(b), its standard error, 95 % interval and two-sided p-value."""

    mean: float
    error: float
    low: float
    high: float
    p_value: float

    @property
    def verdict(self) -> Verdict:
        """Whether a is higher or lower than b, or neither at the 5 % level."""
        if not self.p_value < LEVEL:
            return "not distinguishable"
        return "higher" if self.mean > 0 else "lower"


def components(a: Array, b: Array, paired: bool, draws: int = DRAWS) -> Components:
    """The sources of variance of mean(a) - mean(b), by the pigeonhole bootstrap (Owen 2007).

    Seeds and prompts are resampled independently. Resampling both together would count the residual three times: as
    seeds, as prompts, and as both. Each source is therefore resampled on its own, too, so that the residual can be
    counted once. A matrix with a single seed, such as that of the SFT model, is treated as fixed: its variance over
    seeds is unknown.

    Args:
        a: [seeds, prompts].
        b: [seeds, prompts] on the same prompts; the number of seeds may differ from that of a unless `paired`.
        paired: whether seed i of a and seed i of b are the same.
        draws: the number of bootstrap samples.
    """
    groups = [a - b] if paired else [a, b]
    prompts = a.shape[1]
    by_prompt = _weights(prompts, draws, stream=1)
    seeds, residual = [], []
    for stream, group in enumerate(groups, start=2):
        count = len(group)
        if count < 2:
            continue
        by_seed = _weights(count, draws, stream)
        # without the effects of seeds and prompts: what remains is their interaction
        centred = group - group.mean(axis=1, keepdims=True) - group.mean(axis=0) + group.mean()
        seeds.append((_unbiased(by_seed @ group.mean(axis=1), count), count))
        residual.append(_unbiased(((by_seed @ centred) * by_prompt).sum(axis=1), count, prompts))
    variance = _unbiased(by_prompt @ (a.mean(axis=0) - b.mean(axis=0)), prompts)
    return Components(tuple(seeds), variance, prompts, tuple(residual))


def difference(a: Array, b: Array, paired: bool, draws: int = DRAWS) -> Difference:
    """Compare the outcomes of two rows on the same prompts; the arguments are those of `components`.

    Percentiles of bootstrapped means of three seeds are far too narrow. The interval is therefore that of Student's t
    with the bootstrap's standard error and estimated degrees of freedom. With few seeds such intervals cover the true
    difference in 93 to 97 % of cases, least if seeds are paired or if the row with fewer seeds varies more (measured in
    tests/report).
    """
    parts = components(a, b, paired, draws)
    mean, error = float(a.mean() - b.mean()), math.sqrt(parts.total)
    if error < 1e-12:
        return Difference(mean, 0.0, mean, mean, 1.0 if abs(mean) < 1e-12 else 0.0)
    half = float(stdtrit(parts.freedom, 1 - LEVEL / 2)) * error
    p_value = 2 * float(stdtr(parts.freedom, -abs(mean) / error))
    return Difference(mean, error, mean - half, mean + half, p_value)


@dataclass(frozen=True)
class Need:
    """What would make the observed difference significant: seeds per row and, if more seeds alone cannot, instructions.

    `seeds` is the estimate. `fewest` to `most` is its 80 % confidence interval with regard to the variance over seeds,
    which few seeds estimate poorly. `instructions` is None if the present number is enough.
    """

    seeds: int
    fewest: int
    most: int
    instructions: int | None = None


def seeds_needed(a: Array, b: Array, paired: bool, power: float = POWER) -> Need | None:
    """How many seeds per row would make the observed difference significant at 5 % (two-sided) with this power.

    n = z² s² / (d² - z² v), with the variance s² per seed and the instructions' variance v of the difference d. If z² v
    alone exceeds d², no number of seeds is enough: then instructions and seeds share the allowed variance equally. For
    few seeds, quantiles of Student's t replace z, as in `difference`.

    Returns:
        None if no row has two seeds, or if the means are equal.
    """
    parts, gap = components(a, b, paired), abs(float(a.mean() - b.mean()))
    if not parts.seeds or not gap > 1e-12:
        return None
    prompts = max(parts.prompts - sum(parts.residual), 0.0)
    # the rows may have different numbers of seeds now, but the answer is one number for both
    per_seed = sum(count * variance for variance, count in parts.seeds)
    allowed = (gap / _quantiles(math.inf, power)) ** 2
    enough = allowed > prompts
    share = allowed - prompts if enough else allowed / 2
    variances = (per_seed, *_variance_range(per_seed, parts.seeds))
    seeds, fewest, most = (_seeds_for(variance, share, len(parts.seeds), power) for variance in variances)
    return Need(seeds, fewest, most, None if enough else math.ceil(2 * prompts / allowed * parts.prompt_count))


def _variance_range(per_seed: float, groups: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """The 80 % confidence interval of the variance per seed: chi-square with Satterthwaite's degrees of freedom."""
    spread = sum((count * variance) ** 2 / (count - 1) for variance, count in groups)
    if not spread:
        return per_seed, per_seed
    freedom, tail = per_seed**2 / spread, (1 - RANGE_LEVEL) / 2
    return tuple(freedom * per_seed / float(chdtri(freedom, level)) for level in (tail, 1 - tail))  # type: ignore[return-value]


def _seeds_for(per_seed: float, allowed: float, groups: int, power: float) -> int:
    """The smallest number of seeds whose mean has at most the allowed variance, given their degrees of freedom."""
    normal = _quantiles(math.inf, power)
    seeds = max(2, math.ceil(per_seed / allowed))
    # with fewer degrees of freedom the quantiles are larger, so that less variance is allowed
    while seeds < MANY_SEEDS and per_seed / seeds * (_quantiles(groups * (seeds - 1), power) / normal) ** 2 > allowed:
        seeds += 1
    return seeds


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


@lru_cache(maxsize=16)
def _weights(count: int, draws: int, stream: int) -> Array:
    """Bootstrap weights [draws, count], the same on every call, so that reports are reproducible."""
    return np.random.default_rng((0, stream)).multinomial(count, np.full(count, 1 / count), size=draws) / count


def _unbiased(means: Array, *counts: int) -> float:
    """Variance of bootstrapped means, corrected by n / (n - 1) for each of the `counts` that were resampled."""
    return float(means.var()) * math.prod(count / (count - 1) for count in counts)
