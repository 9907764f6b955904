"""What a table of a few seeds on a few hundred evaluation instructions can tell, and what it cannot.

Outcomes are matrices [seeds, prompts]: one number per run and evaluation instruction, the instructions in the same
order in every run. Both are samples: another seed gives another policy, another instruction another comparison. So the
mean of a matrix has the variance

    σ_seed² / n  +  σ_prompt² / m  +  σ_residual² / (n m)

for n seeds and m prompts, and a standard error that counts only the prompts (as published win rates do) or only the
seeds is too small.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

# Student's t: its CDF and its quantiles; chi-square: the quantile of an upper tail
from scipy.special import chdtri, stdtr, stdtrit  # type: ignore[import-untyped]

Array = NDArray[np.float64]
Verdict = Literal["higher", "lower", "not distinguishable"]
DRAWS = 4000
POWER = 0.8
LEVEL = 0.05
MANY = 1000
RANGE = 0.8  # how often the range of the seeds needed holds what the true spread over seeds would need


def seed_error(values: Sequence[float] | Array, draws: int = DRAWS) -> float:
    """Standard error of the mean over seeds, by bootstrap; nan for fewer than two.

    Resampling n values underestimates their variance by (n - 1) / n, a third for three seeds, so it is scaled back.
    """
    sample = np.asarray(values, float)
    if len(sample) < 2:
        return math.nan
    return math.sqrt(_unbiased(_weights(len(sample), draws, stream=0) @ sample, len(sample)))


def covered(seeds: int, errors: float) -> float:
    """How often a mean over so many seeds ± so many of its standard errors holds the true mean (Student's t)."""
    return float(2 * stdtr(seeds - 1, errors) - 1)


def errors_for(seeds: int, level: float = 1 - LEVEL) -> float:
    """How many standard errors a mean over so many seeds needs on either side to hold the true mean so often."""
    return float(stdtrit(seeds - 1, (1 + level) / 2))


def judge_error(outcomes: Array, draws: int = DRAWS) -> float:
    """Standard error that the mean of [seeds, prompts] has because the evaluation instructions are a finite sample."""
    per_prompt = outcomes.mean(axis=0)
    if len(per_prompt) < 2:
        return math.nan
    return math.sqrt(_unbiased(_weights(len(per_prompt), draws, stream=1) @ per_prompt, len(per_prompt)))


@dataclass(frozen=True)
class Components:
    """Variances of a mean by source: `seeds` per group of runs that were drawn together, as are `residual`."""

    seeds: tuple[tuple[float, int], ...]  # (variance, number of seeds)
    prompts: float
    prompt_count: int
    residual: tuple[float, ...]

    @property
    def total(self) -> float:
        """Variance of the mean.

        The residual is part of the seeds' spread and of the prompts' spread, and so must be taken off once; no source
        adds less than nothing.
        """
        seeds = sum(variance for variance, _ in self.seeds)
        return max(seeds + self.prompts - sum(self.residual), seeds, self.prompts)

    @property
    def freedom(self) -> float:
        """Degrees of freedom of `total` (Satterthwaite 1946): few where the spread over a few seeds dominates."""
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
        """What may be said of a against b."""
        if not self.p_value < LEVEL:
            return "not distinguishable"
        return "higher" if self.mean > 0 else "lower"


def components(a: Array, b: Array, paired: bool, draws: int = DRAWS) -> Components:
    """The sources of variance of mean(a) - mean(b), by the pigeonhole bootstrap (Owen 2007).

    Seeds and prompts are resampled independently. Together they count the residual three times (once as seeds, once as
    prompts, once as both); resampling each also alone tells how much that is, so that it can be counted once.
    A matrix with a single seed (the SFT model is one) is taken as fixed: nothing is known of its spread over seeds.
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
        centred = group - group.mean(axis=1, keepdims=True) - group.mean(axis=0) + group.mean()
        seeds.append((_unbiased(by_seed @ group.mean(axis=1), count), count))
        residual.append(_unbiased(((by_seed @ centred) * by_prompt).sum(axis=1), count, prompts))
    variance = _unbiased(by_prompt @ (a.mean(axis=0) - b.mean(axis=0)), prompts)
    return Components(tuple(seeds), variance, prompts, tuple(residual))


def difference(a: Array, b: Array, paired: bool, draws: int = DRAWS) -> Difference:
    """Compare two rows on the same prompts; `paired` says that seed i of a and seed i of b are the same.

    Percentiles of bootstrapped means of three seeds are far too narrow, so the interval is Student's t on the
    bootstrap's standard error, whose degrees of freedom are estimated too. With few seeds the intervals cover 93 to
    97 %, least where seeds are paired or the row with fewer seeds scatters more (measured in
    tests/report/test_statistics.py).
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
    """What would tell the observed gap: runs per row and, where more runs alone cannot, evaluation instructions.

    From `fewest` to `most` seeds are needed in 80 % of cases by what a few seeds tell of their spread.
    """

    seeds: int
    fewest: int
    most: int
    instructions: int | None = None


def seeds_needed(a: Array, b: Array, paired: bool, power: float = POWER) -> Need | None:
    """How many seeds would tell the observed gap at this power, two-sided 5 %; None where there is nothing to go by.

    n = z² s² / (d² - z² v) with the seeds' variance s² and the instructions' variance v of the difference d. Where
    z² v alone exceeds d², no number of seeds is enough: then instructions and seeds share the allowed variance equally.
    For few seeds Student's t stands in for z, as it does in `difference`.
    """
    parts, gap = components(a, b, paired), abs(float(a.mean() - b.mean()))
    if not parts.seeds or not gap > 1e-12:
        return None
    prompts = max(parts.prompts - sum(parts.residual), 0.0)
    # the rows may have different numbers of seeds now, and would have the same number then
    per_seed = sum(count * variance for variance, count in parts.seeds)
    allowed = (gap / _quantiles(math.inf, power)) ** 2
    enough = allowed > prompts
    share = allowed - prompts if enough else allowed / 2
    seeds, fewest, most = (
        _enough(spread, share, len(parts.seeds), power) for spread in (per_seed, *_range(per_seed, parts.seeds))
    )
    return Need(seeds, fewest, most, None if enough else math.ceil(2 * prompts / allowed * parts.prompt_count))


def _range(per_seed: float, groups: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Where the true variance lies in 80 % of cases, by chi-square with Satterthwaite's degrees of freedom."""
    spread = sum((count * variance) ** 2 / (count - 1) for variance, count in groups)
    if not spread:
        return per_seed, per_seed
    freedom, tail = per_seed**2 / spread, (1 - RANGE) / 2
    return tuple(freedom * per_seed / float(chdtri(freedom, level)) for level in (tail, 1 - tail))  # type: ignore[return-value]


def _enough(per_seed: float, allowed: float, groups: int, power: float) -> int:
    """The fewest seeds whose variance fits, when also their own degrees of freedom are reckoned with."""
    normal = _quantiles(math.inf, power)
    seeds = max(2, math.ceil(per_seed / allowed))
    # Student's t matters below some hundred seeds only
    while seeds < MANY and per_seed / seeds * (_quantiles(groups * (seeds - 1), power) / normal) ** 2 > allowed:
        seeds += 1
    return seeds


def _quantiles(freedom: float, power: float) -> float:
    """1.96 + 0.84 for many degrees of freedom and 80 %."""
    return float(stdtrit(freedom, 1 - LEVEL / 2) + stdtrit(freedom, power))


def holm(p_values: Sequence[float]) -> list[bool]:
    """Which comparisons stand at 5 % for all of them together (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    standing = [False] * len(p_values)
    for rank, i in enumerate(order):
        if not p_values[i] < LEVEL / (len(order) - rank):
            break
        standing[i] = True
    return standing


@lru_cache(maxsize=16)
def _weights(count: int, draws: int, stream: int) -> Array:
    """Bootstrap weights [draws, count]; the same whenever asked, so that a report can be made twice."""
    return np.random.default_rng((0, stream)).multinomial(count, np.full(count, 1 / count), size=draws) / count


def _unbiased(means: Array, *counts: int) -> float:
    """Variance of bootstrapped means, scaled up for what resampling `counts` values takes away."""
    return float(means.var()) * math.prod(count / (count - 1) for count in counts)
