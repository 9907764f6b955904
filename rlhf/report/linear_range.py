"""The initial linear range of a curve, such as that of the reward against the square root of the KL."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr  # type: ignore[import-untyped]

from rlhf.report.statistics import LEVEL, Array

MIN_GROUPS = 3  # evaluations: two would be straight always
BEND = 0.1  # relative change of the slope over the range that still counts as straight


@dataclass(frozen=True)
class Line:
    """The line offset + slope · x for 0 ≤ x ≤ `end`; `bent` says whether the data continue beyond `end`."""

    offset: float
    slope: float
    end: float
    bent: bool


def initial_line(groups: Sequence[Array], offset: float) -> Line | None:
    """Fit a line through (0, offset) to the longest initial range over which the data are straight.

    A range consists of the first groups in order of x, at least three. The slope from the offset, (y − offset) / x, is
    averaged with weights x, which suits a variance of y that grows with x: replicates drift apart during training. The
    range is straight if a regression of that slope on x changes by no more than a tenth of its value at 0 over the
    range, or if the change is not significant at 5 % (t-test).

    Args:
        groups: one array [replicates, 2] of (x, y) per evaluation; those with a mean x of 0 are ignored.
        offset: y at x = 0.

    Returns:
        The line, or None if not even the first three groups are straight.
    """
    ordered = sorted((group for group in groups if group[:, 0].mean() > 1e-9), key=lambda group: group[:, 0].mean())
    for count in range(len(ordered), MIN_GROUPS - 1, -1):
        x, y = np.concatenate(ordered[:count]).T
        slopes = (y - offset) / x
        if _is_constant(x, slopes):
            end = float(ordered[count - 1][:, 0].mean())
            return Line(offset, float(np.average(slopes, weights=x)), end, count < len(ordered))
    return None


def _is_constant(x: Array, slopes: Array) -> bool:
    """Whether slopes [points] at x [points] show no relevant or no significant trend (weighted least squares)."""
    root = np.sqrt(x)  # the square root of the weights
    terms, weighted = np.stack([root, root * x], axis=1), root * slopes
    (first, change), *_ = np.linalg.lstsq(terms, weighted, rcond=None)
    if abs(change) * x.max() <= BEND * abs(first):
        return True
    # t-test of the trend; an error of 0 means an exact fit with a trend, which is not constant
    freedom = len(x) - 2
    variance = float(((weighted - terms @ [first, change]) ** 2).sum()) / freedom
    error = math.sqrt(variance * np.linalg.pinv(terms.T @ terms)[1, 1])
    return error > 0 and 2 * float(stdtr(freedom, -abs(change) / error)) >= LEVEL
