"""How much each source contributes to the spread of a metric: a nested model, estimated by REML.

A run's value is that of its row, plus the luck of its SFT model, of its reward model on that SFT model, of its PPO run
on both, and of the evaluation instructions. All but the row are random and have a variance each, taken to be the same
in all rows. Restricted maximum likelihood (Patterson & Thompson 1971) estimates those of the nested sources from
unbalanced designs as well; for balanced ones it is the analysis of variance, with negative estimates set to 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize  # type: ignore[import-untyped]

from rlhf.report.statistics import Array

Labels = NDArray[np.int64]
LARGEST_RATIO = 1e6  # of a variance to that of the innermost source, where the search ends
STARTS = (0.1, 1.0, 10.0)  # ratios from which it begins


def reml(values: Array, rows: Labels, sources: Sequence[Labels]) -> list[float]:
    """The variances of nested sources, by restricted maximum likelihood.

    Args:
        values: [runs].
        rows: [runs], the row of each run; every row has a mean of its own.
        sources: from the outermost to the innermost, the group of each run [runs]. Groups are nested, and the innermost
            ones hold one run each.

    Returns:
        A variance of at least 0 for each source; NaN for all of them if no row has two runs.
    """
    count, means = len(values), _indicators(rows)
    freedom = count - means.shape[1]
    if freedom < 1:
        return [float("nan")] * len(sources)
    # The likelihood of the residuals from the rows' means: in an orthonormal basis of their space, [freedom] of them.
    basis = np.linalg.svd(means)[0][:, means.shape[1] :]
    residuals = basis.T @ values
    scale = float(residuals @ residuals) / freedom
    if scale < 1e-24:
        return [0.0] * len(sources)
    if len(sources) == 1:
        return [scale]
    shared = [(joint := basis.T @ _indicators(groups)) @ joint.T for groups in sources[:-1]]

    def covariance(ratios: Array) -> Array:
        return np.eye(freedom) + sum((r * matrix for r, matrix in zip(ratios, shared, strict=True)), np.zeros(()))

    def innermost(ratios: Array) -> float:
        return float(residuals @ np.linalg.solve(covariance(ratios), residuals)) / freedom

    def deviance(ratios: Array) -> float:
        return freedom * float(np.log(innermost(ratios) / scale)) + float(np.linalg.slogdet(covariance(ratios))[1])

    bounds = [(0.0, LARGEST_RATIO)] * len(shared)
    found = [minimize(deviance, np.full(len(shared), start), bounds=bounds, method="L-BFGS-B") for start in STARTS]
    ratios = min(found, key=lambda result: float(result.fun)).x
    inner = innermost(ratios)
    return [*(float(ratio) * inner for ratio in ratios), inner]


@dataclass(frozen=True)
class Sources:
    """The variances of one metric by source, and how many of each there are: what a row's standard error consists of.

    Attributes:
        nested: the variances of the nested sources, the outermost first, each per group.
        counts: the number of groups of each in a row.
        instructions: the variance of the instructions' common effect, per instruction.
        interaction: that of a run's own luck with an instruction, per run and instruction.
        prompts: the number of instructions; 0 if the metric is not known for each of them.
    """

    nested: tuple[float, ...]
    counts: tuple[float, ...]
    instructions: float
    interaction: float
    prompts: int

    def parts(self) -> list[float]:
        """The variance of a row's mean by source: the nested ones, then the instructions with their interaction."""
        parts = [variance / count for variance, count in zip(self.nested, self.counts, strict=True)]
        return [*parts, (self.instructions + self.interaction / self.counts[-1]) / max(self.prompts, 1)]

    @property
    def error(self) -> float:
        """The standard error of a row's mean."""
        return float(np.sqrt(sum(self.parts())))

    def with_counts(self, counts: Sequence[float]) -> "Sources":
        """The same with other numbers of groups."""
        return replace(self, counts=tuple(counts))

    def with_prompts(self, prompts: int) -> "Sources":
        """The same with another number of instructions."""
        return replace(self, prompts=prompts)


def estimate_sources(
    values: Array, rows: Labels, sources: Sequence[Labels], outcomes: Sequence[Array] | None
) -> Sources:
    """Estimate the sources of variance of one metric.

    The instructions are crossed with the runs. Their effects are estimated by two-way analysis of variance within each
    row and averaged over rows; what that explains of the spread over runs is taken from the innermost source.

    Args:
        values: [runs], the metric.
        rows: [runs].
        sources: as for `reml`.
        outcomes: for each row, [runs, prompts] whose mean over prompts is the metric; None if there are none.
    """
    nested = reml(values, rows, sources)
    per_row = [[len(np.unique(groups[rows == row])) for row in np.unique(rows)] for groups in sources]
    counts = tuple(float(np.mean(numbers)) for numbers in per_row)
    if not outcomes:
        return Sources(tuple(nested), counts, 0.0, 0.0, 0)
    effects = np.array([_instruction_effects(matrix) for matrix in outcomes])
    common, interaction = (float(max(part, 0.0)) for part in effects.mean(axis=0))
    prompts = outcomes[0].shape[1]
    innermost = max(nested[-1] - interaction / prompts, 0.0)
    return Sources((*nested[:-1], innermost), counts, common, interaction, prompts)


def _instruction_effects(matrix: Array) -> tuple[float, float]:
    """The variances of the prompts' common effect and of the interaction, from [runs, prompts]; 0 of it for one run."""
    runs, prompts = matrix.shape
    spread = float(matrix.mean(axis=0).var(ddof=1))
    if runs < 2:
        return spread, 0.0
    rest = matrix - matrix.mean(axis=1, keepdims=True) - matrix.mean(axis=0) + matrix.mean()
    interaction = float((rest**2).sum()) / ((runs - 1) * (prompts - 1))
    return spread - interaction / runs, interaction


def _indicators(labels: Labels) -> Array:
    """[runs, groups]: 1 where a run is in a group."""
    return (labels[:, None] == np.unique(labels)[None]).astype(float)
