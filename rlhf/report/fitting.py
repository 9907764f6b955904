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
    It is straight if a parabola through the same offset bends away from its own tangent at 0 by no more than a tenth of
    the rise at the range's end, or if its quadratic term is not significant at 5 %.
    """
    ordered = sorted((group for group in groups if group[:, 0].mean() > 1e-9), key=lambda group: group[:, 0].mean())
    for count in range(len(ordered), FEWEST - 1, -1):
        x, y = np.concatenate(ordered[:count]).T
        y = y - offset
        if _is_straight(x, y):
            end = float(ordered[count - 1][:, 0].mean())
            return Line(offset, float(x @ y / (x @ x)), end, count < len(ordered))
    return None


def _is_straight(x: Array, y: Array) -> bool:
    powers = np.stack([x, x**2], axis=1)
    (linear, quadratic), *_ = np.linalg.lstsq(powers, y, rcond=None)
    if abs(quadratic) * x.max() <= BEND * abs(linear):
        return True
    freedom = len(x) - 2
    variance = float(((y - powers @ [linear, quadratic]) ** 2).sum()) / freedom
    error = math.sqrt(variance * np.linalg.pinv(powers.T @ powers)[1, 1])
    return error > 0 and 2 * float(stdtr(freedom, -abs(quadratic) / error)) >= LEVEL
