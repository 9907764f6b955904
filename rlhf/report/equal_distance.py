"""Rows compared at equal distance from SFT: what each has gained by the time that √KL first reaches a common value.

At equal steps, a penalty that merely slows training down looks different from none. At equal distance it does not.
Values are interpolated, linearly in √KL, between the evaluations of a run before and after it first gets to a distance,
and never extrapolated: a row has a value only as far as all its runs went. Where a run's first evaluation after that of
SFT is already beyond a distance, its value there assumes a straight line from SFT, and is marked.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np

from rlhf.report.comparisons import (
    Comparison,
    compare,
    compared_metrics,
    corrected,
    mean_over,
    pair_replicates,
    single_note,
)
from rlhf.report.metric_info import metric_info
from rlhf.report.recorded_run import RecordedRun
from rlhf.report.rows import Row, per_prompt
from rlhf.report.runs import Sweep
from rlhf.report.statistics import Array
from rlhf.report.tables import NOTHING, Cell, Number, Table, WithInterval

KL = "eval/true_kl"
METRICS = (
    "eval/win_rate",
    "eval/gold_utility",
    "eval/factual_precision",
)  # shown in any case
COLUMNS = 4  # distances that are chosen if the layout does not name any
GRID = 40  # points of a curve in a figure
STRAIGHT = "°"  # the mark of values that assume a straight line from SFT
STRAIGHT_NOTE = (
    f" {STRAIGHT}: some run's first evaluation is beyond that distance, so the value assumes a straight line from SFT;"
    " evaluate earlier (ppo.eval_every takes a list of steps, too)."
)
ROUND = (1, 2, 2.5, 5, 10)  # a distance is one of these times a power of ten


@dataclass(frozen=True)
class RowAtDistance(Row):
    """A row, all of whose runs reach `distance` (√nats per token), at that distance."""

    distance: float = 0.0

    @property
    def straight(self) -> bool:
        """Whether a run has no evaluation up to the distance but that of SFT."""
        found = [_crossing(run, self.distance) for run in self.runs]
        return any(before == 0 and 0 < share < 1 for (before, _), share in found)

    def value_of(self, run: RecordedRun, metric: str) -> float | None:
        """The metric of a run at the distance."""
        (before, after), share = _crossing(run, self.distance)
        values = [run.evaluations[step].get(metric) for step in (before, after)]
        return None if None in values else float(np.average(values, weights=[1 - share, share]))  # type: ignore[arg-type]

    def outcome_of(self, run: RecordedRun, metric: str) -> Array | None:
        """[prompts] whose mean is the metric of a run at the distance."""
        (before, after), share = _crossing(run, self.distance)
        first, second = (per_prompt(run.outcomes.get(step, {}), metric) for step in (before, after))
        if first is None or second is None or len(first) != len(second):
            return None
        return (1 - share) * first + share * second


def at_distance(row: Row, distance: float) -> RowAtDistance | None:
    """The row at a distance; None if not all its runs get there."""
    far = reach(row)
    return RowAtDistance(row.label, row.runs, None, row.depth, distance) if 0 < far >= distance else None


def reach(row: Row) -> float:
    """The largest √KL that all runs of a row got to; 0 for runs without evaluations from step 0 on."""
    return min(max(_distances(run).values(), default=0.0) for run in row.runs)


def common_distances(sweep: Sweep) -> list[float]:
    """The layout's `distances`, or else round numbers: one within the reach of all rows, others of at least two."""
    if asked := sweep.layout.get("distances"):
        return sorted(map(float, asked))
    reaches = sorted(found for row in sweep.trained if (found := reach(row)) > 0)
    if len(reaches) < 2:
        return []
    nearest, farthest = reaches[0], reaches[-2]
    step = _rounded(farthest / COLUMNS)
    grid = [round(step * i, 10) for i in range(1, COLUMNS + 1) if step * i <= farthest]
    return sorted({*grid, _rounded(nearest)}) if not grid or nearest < grid[0] else grid


def along_distance(row: Row, metric: str) -> dict[float, Array]:
    """√KL → [replicates, 2] (√KL and the metric in display units), on a grid as far as all runs of the row went."""
    found, scale = {}, metric_info(metric).scale
    for distance in np.linspace(0, reach(row), GRID):
        here = at_distance(row, float(distance))
        values = here.values(metric) if here else []
        if values and np.isfinite(values).all():
            found[float(distance)] = np.stack([np.full(len(values), distance), scale * np.asarray(values)], axis=1)
    return found


def distance_table(sweep: Sweep, distances: Sequence[float]) -> Table:
    """One line per metric and row: its mean at each distance, with the 95 % interval.

    The metrics are those in which rows are compared, then the others of `METRICS`.
    """
    lines: list[Sequence[Cell]] = []
    for metric in dict.fromkeys((*compared_metrics(sweep), *METRICS)):
        for row in sweep.trained:
            cells = [_mean_cell(row, metric, distance) for distance in distances]
            if any(cell != NOTHING for cell in cells):
                lines.append([metric_info(metric).title, row.label, Number(reach(row), digits=2), *cells])
    caption = (
        "Means at equal distance from SFT, with 95 % intervals over"
        f" {sweep.unit} and instructions: what a row has gained when its √KL (√nats per token) first reaches the value"
        " at the head of the column, interpolated between evaluations. –: not all its runs got that far; “reach” is how"
        " far all of them got. Distance is measured per token, at the training temperature."
    )
    caption += _straight_note(lines) + single_note(sweep)
    return Table(["metric", "row", "reach", *(f"√KL {at:g}" for at in distances)], lines, caption)


def compared_at(
    sweep: Sweep, against: Row, metrics: Sequence[str], distances: Sequence[float]
) -> dict[float, list[Comparison]]:
    """Compare the rows with `against` in each metric at each distance that both reach.

    All of it is one family for Holm's correction.
    """
    found: list[tuple[float, Comparison]] = []
    for distance in distances:
        other = at_distance(against, distance)
        others = [row for row in sweep.trained if row is not against] if other else []
        for here in filter(None, (at_distance(row, distance) for row in others)):
            pairs = [compare(here, other, metric, pair_replicates(sweep)) for metric in metrics]  # type: ignore[arg-type]
            found += [(distance, pair) for pair in pairs if pair]
    stand = corrected([item for _, item in found])
    return {
        distance: [item for (at, _), item in zip(found, stand, strict=True) if at == distance] for distance in distances
    }


def distance_difference_table(sweep: Sweep, found: dict[float, list[Comparison]], against: Row) -> Table:
    """One line per metric and row: the difference from the baseline at each distance, with its interval."""
    every = [item for items in found.values() for item in items]
    metrics = list(dict.fromkeys(item.metric for item in every))
    lines: list[Sequence[Cell]] = []
    for metric, row in product(metrics, sweep.trained):
        cells: list[Cell] = []
        for items in found.values():
            gap = next((item for item in items if (item.metric, item.row.label) == (metric, row.label)), None)
            cells.append(_difference_cell(gap) if gap else NOTHING)
        if any(cell != NOTHING for cell in cells):
            lines.append([*([metric_info(metric).title] if len(metrics) > 1 else []), row.label, *cells])
    info = metric_info(metrics[0])
    unit = f" ({info.points})" if info.points else ""
    caption = (
        f"Each row minus “{against.label}”{'' if len(metrics) > 1 else f' in {info.name}{unit}'}, when both have"
        " first got to the same √KL; 95 % intervals as in the table of differences at equal steps. *: significant after"
        f" Holm's correction for all {len(every)} comparisons of this table."
    )
    caption += _straight_note(lines) + single_note(sweep)
    header = [*(["metric"] if len(metrics) > 1 else []), "row"]
    return Table([*header, *(f"√KL {at:g}" for at in found)], lines, caption)


def assumes_straight(item: Comparison) -> bool:
    """Whether a comparison at a distance has a row whose value there assumes a straight line from SFT."""
    return any(isinstance(row, RowAtDistance) and row.straight for row in (item.row, item.other))


def _straight_note(lines: Sequence[Sequence[Cell]]) -> str:
    marked = any(isinstance(cell, WithInterval) and STRAIGHT in cell.mark for line in lines for cell in line)
    return STRAIGHT_NOTE if marked else ""


def _mean_cell(row: Row, metric: str, distance: float) -> Cell:
    """The mean of a row at a distance with its interval, in display units."""
    here, info = at_distance(row, distance), metric_info(metric)
    mean = mean_over(here, metric) if here else None
    if here is None or mean is None:
        return NOTHING
    mark = ("†" if row.single else "") + (STRAIGHT if here.straight else "")
    return WithInterval(info.scale * mean.mean, info.scale * mean.low, info.scale * mean.high, info.digits, mark)


def _difference_cell(item: Comparison) -> WithInterval:
    """A difference with its interval, in display units."""
    info, gap = metric_info(item.metric), item.difference
    value, low, high = (info.scale * number for number in (gap.mean, gap.low, gap.high))
    mark = ("*" if item.stands else "") + ("†" if item.single else "") + (STRAIGHT if assumes_straight(item) else "")
    return WithInterval(value, low, high, info.digits, mark, signed=True)


def _distances(run: RecordedRun) -> dict[int, float]:
    """Step → √KL at each evaluation; {} unless they begin at step 0."""
    known = {step: values.get(KL) for step, values in run.evaluations.items()}
    # the estimate of a small KL can be negative
    found = {
        step: math.sqrt(max(kl, 0.0)) for step, kl in known.items() if isinstance(kl, int | float) and math.isfinite(kl)
    }
    return found if 0 in found else {}


def _crossing(run: RecordedRun, distance: float) -> tuple[tuple[int, int], float]:
    """The steps of the evaluations before and after a run first gets to a distance, and the share of the latter.

    Raises:
        ValueError: it never does.
    """
    places = list(_distances(run).items())
    for (before, near), (after, far) in pairwise(places):
        if near <= distance <= far:
            return (before, after), (distance - near) / (far - near) if far > near else 0.0
    raise ValueError(f"{run.name} does not reach √KL {distance}")


def _rounded(number: float) -> float:
    """The largest round number that is at most this one."""
    power = 10.0 ** math.floor(math.log10(number))
    return round(max(step * power for step in ROUND if step * power <= number * (1 + 1e-9)), 10)
