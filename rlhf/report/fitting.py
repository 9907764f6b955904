"""Where a curve stops being straight."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr  # type: ignore[import-untyped]

from rlhf.report.statistics import LEVEL, Array

FEWEST = 3
BEND = 0.1


@dataclass(frozen=True)
class Line:
    """offset + slope · x, which holds for x up to `end` (`bent` says whether the data go on beyond it)."""

    offset: float
    slope: float
    end: float
    bent: bool


def initial_line(groups: Sequence[Array], offset: float) -> Line | None:
    """The line from (0, offset) fitted to the longest initial range that is straight; None if none is.

    A group holds the points [seeds, 2] of one evaluation; a range is the first groups in order of x, at least three.
    Fitted is the slope from the offset, (y − offset) / x, with weights x, as for a variance of y that grows with x:
    seeds part as they go. It is straight if that slope changes over the range by no more than a tenth of what it is
    at 0, or if its change is not significant at 5 %.
    """
    ordered = sorted((group for group in groups if group[:, 0].mean() > 1e-9), key=lambda group: group[:, 0].mean())
    for count in range(len(ordered), FEWEST - 1, -1):
        x, y = np.concatenate(ordered[:count]).T
        slopes = (y - offset) / x
        if _is_constant(x, slopes):
            end = float(ordered[count - 1][:, 0].mean())
            return Line(offset, float(np.average(slopes, weights=x)), end, count < len(ordered))
    return None


def _is_constant(x: Array, slopes: Array) -> bool:
    root = np.sqrt(x)
    terms, weighted = np.stack([root, root * x], axis=1), root * slopes
    (first, change), *_ = np.linalg.lstsq(terms, weighted, rcond=None)
    if abs(change) * x.max() <= BEND * abs(first):
        return True
    freedom = len(x) - 2
    variance = float(((weighted - terms @ [first, change]) ** 2).sum()) / freedom
    error = math.sqrt(variance * np.linalg.pinv(terms.T @ terms)[1, 1])
    return error > 0 and 2 * float(stdtr(freedom, -abs(change) / error)) >= LEVEL
