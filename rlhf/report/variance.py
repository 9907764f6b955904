"""How much each source contributes to the spread of a metric: a nested model, estimated by REML.

A run's value is that of its row, plus the luck of its SFT model, of its reward model on that SFT model, of its PPO run
on both, of the evaluation instructions, and of each of these models with each instruction. All but the row are random
and have a variance each, taken to be the same in all rows. Restricted maximum likelihood (Patterson & Thompson 1971)
estimates those of the nested sources from unbalanced designs as well; for balanced ones it is the analysis of variance,
with negative estimates set to 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import helmert  # type: ignore[import-untyped]
from scipy.optimize import minimize  # type: ignore[import-untyped]

from rlhf.report.statistics import Array

Labels = NDArray[np.int64]
LARGEST_RATIO = 1e6  # of a variance to that of the innermost source, where the search ends
STARTS = (0.1, 1.0, 10.0)  # ratios from which it begins


def reml(values: Array, rows: Labels, sources: Sequence[Labels]) -> list[float]:
    """The variances of nested sources, by restricted maximum likelihood.

    Args:
        values: [runs], or [runs, samples] for independent samples with the same variances.
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
    residuals = basis.T @ values.reshape(count, -1)
    products = residuals @ residuals.T / residuals.shape[1]
    scale = float(np.trace(products)) / freedom
    if scale < 1e-24:
        return [0.0] * len(sources)
    if len(sources) == 1:
        return [scale]
    shared = [(joint := basis.T @ _indicators(groups)) @ joint.T for groups in sources[:-1]]

    def covariance(ratios: Array) -> Array:
        return np.eye(freedom) + sum((r * matrix for r, matrix in zip(ratios, shared, strict=True)), np.zeros(()))

    def innermost(ratios: Array) -> float:
        return float(np.trace(np.linalg.solve(covariance(ratios), products))) / freedom

    def deviance(ratios: Array) -> float:
        return freedom * float(np.log(innermost(ratios) / scale)) + float(np.linalg.slogdet(covariance(ratios))[1])

    bounds = [(0.0, LARGEST_RATIO)] * len(shared)
    found = [minimize(deviance, np.full(len(shared), start), bounds=bounds, method="L-BFGS-B") for start in STARTS]
    ratios = min(found, key=lambda result: float(result.fun)).x
    inner = innermost(ratios)
    return [*(float(ratio) * inner for ratio in ratios), inner]


@dataclass(frozen=True)
class Sources:
    """The variances of one metric by source, and how much of each there is in the mean of a row.

    The mean of a row is that of its outermost groups, the report's replicates, and theirs that of their runs.

    Attributes:
        nested: the variances of the nested sources, the outermost first, each per group.
        shares: [rows, sources], the sum of the squares of the weights that the groups have in the mean of a row. For n
            groups of equal weight it is 1 / n, and more for unequal ones.
        instructions: the variance of the instructions' common effect, per instruction.
        interactions: for each nested source that of the luck of a group with an instruction.
        prompts: the number of instructions; 0 if the metric is not known for each of them.
    """

    nested: tuple[float, ...]
    shares: Array
    instructions: float = 0.0
    interactions: tuple[float, ...] = ()
    prompts: int = 0

    def parts(self) -> list[float]:
        """The variance of a row's mean by source: the nested ones, then the instructions with their interactions.

        Where rows have different numbers of groups, it is the mean over rows.
        """
        shares = self.shares.mean(axis=0)
        if not self.prompts:
            return [*(shares * self.nested), 0.0]
        return [*(shares * self.nested), (self.instructions + float(shares @ self.interactions)) / self.prompts]

    @property
    def error(self) -> float:
        """The standard error of a row's mean."""
        return float(np.sqrt(sum(self.parts())))

    def with_more(self, source: int) -> "Sources":
        """The same with one more group of a source in every group above it, and all below it as in the others."""
        before = self._per_parent(source)
        factors = np.ones_like(self.shares)
        factors[:, source:] = (before / (before + 1))[:, None]
        return replace(self, shares=self.shares * factors)

    def groups_added(self, source: int) -> Array:
        """[sources]: how many groups of each source that takes, on average over rows."""
        added = 1 / self.shares / self._per_parent(source)[:, None]
        added[:, :source] = 0
        return added.mean(axis=0)

    def with_prompts(self, prompts: int) -> "Sources":
        """The same with another number of instructions."""
        return replace(self, prompts=prompts)

    def _per_parent(self, source: int) -> Array:
        """[rows]: how many groups of a source there are in a group of the one above it, or in a row."""
        above = self.shares[:, source - 1] if source else 1.0
        return above / self.shares[:, source]


def estimate_sources(
    values: Array, rows: Labels, sources: Sequence[Labels], outcomes: Sequence[Array] | None
) -> Sources:
    """Estimate the sources of variance of one metric.

    The instructions are crossed with the runs, and a model of any source may have luck of its own with each of them.
    Contrasts between instructions know nothing of the luck that a model has with all of them, so they give the
    variances of the interactions; the means over instructions contain 1 / prompts of these.

    Args:
        values: [runs], the metric.
        rows: [runs], numbered from 0; the runs of a row stand together.
        sources: as for `reml`.
        outcomes: for each row, [runs, prompts] whose mean over prompts is the metric; None if there are none.
    """
    found = tuple(reml(values, rows, sources))
    weights = _weights(rows, sources[0])
    shares = np.array([[_share(weights[at], groups[at]) for groups in sources] for at in _places(rows)])
    if not outcomes:
        return Sources(found, shares)
    every, prompts = np.concatenate(outcomes), outcomes[0].shape[1]
    interactions = reml(every @ helmert(prompts).T, rows, sources)
    nested = tuple(max(all_ - own / prompts, 0.0) for all_, own in zip(found, interactions, strict=True))
    spreads = [float((weights[at] @ every[at]).var(ddof=1)) for at in _places(rows)]
    common = float(np.mean(spreads - shares @ interactions))
    return Sources(nested, shares, max(common, 0.0), tuple(interactions), prompts)


def _weights(rows: Labels, outermost: Labels) -> Array:
    """[runs]: the weight of each run in the mean of its row, in which every outermost group counts alike."""
    sizes = [(outermost[rows == row] == group).sum() for row, group in zip(rows, outermost, strict=True)]
    groups = [len(np.unique(outermost[rows == row])) for row in rows]
    return 1 / (np.array(sizes) * np.array(groups))


def _share(weights: Array, groups: Labels) -> float:
    """The sum of the squares of the groups' weights."""
    return float(((weights @ _indicators(groups)) ** 2).sum())


def _places(rows: Labels) -> list[NDArray[np.bool_]]:
    """For each row [runs]: which runs are its own."""
    return [rows == row for row in np.unique(rows)]


def _indicators(labels: Labels) -> Array:
    """[runs, groups]: 1 where a run is in a group."""
    return (labels[:, None] == np.unique(labels)[None]).astype(float)
