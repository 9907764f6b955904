"""The table of differences from SFT or the baseline in every evaluated metric, a column each."""

from collections.abc import Sequence

from rlhf.report.comparisons import Comparison, compared_metrics
from rlhf.report.metric_info import metric_info
from rlhf.report.rows import Row
from rlhf.report.runs import Sweep
from rlhf.report.tables import NOTHING, Cell, Table, WithInterval
from rlhf.report.text import joined


def column_table(sweep: Sweep, found: Sequence[Comparison], against: Row) -> Table:
    """One line per row: its difference in every metric, with the 95 % interval, marked where it is significant.

    Args:
        sweep: the runs.
        found: the comparisons with `against` in every metric, corrected.
        against: what is subtracted.
    """
    by_place = {(item.row.label, item.metric): item for item in found}
    metrics = list(dict.fromkeys(item.metric for item in found))
    lines: list[Sequence[Cell]] = [
        [row.label, *(_cell(by_place.get((row.label, metric))) for metric in metrics)]
        for row in sweep.trained
        if any((row.label, metric) in by_place for metric in metrics)
    ]
    infos = [metric_info(metric) for metric in metrics]
    header = ["row", *(f"{info.name} ({info.points})" if info.points else info.name for info in infos)]
    return Table(header, lines, _caption(sweep, found, against))


def _cell(item: Comparison | None) -> Cell:
    """A difference with its interval, in display units."""
    if item is None:
        return NOTHING
    info, gap = metric_info(item.metric), item.difference
    value, low, high = (info.scale * number for number in (gap.mean, gap.low, gap.high))
    mark = ("*" if item.stands else "") + ("†" if item.single else "")
    return WithInterval(value, low, high, info.digits, mark, signed=True)


def _caption(sweep: Sweep, found: Sequence[Comparison], against: Row) -> str:
    """How to read the table."""
    main = [metric for metric in compared_metrics(sweep) if any(item.metric == metric for item in found)]
    sizes = [sum((item.metric in main) == inside for item in found) for inside in (True, False)]
    text = (
        f"Each row minus “{against.label}” with 95 % intervals, over {sweep.unit} and, where the metric is known for"
        " each of them, instructions. *: significant after Holm's correction"
    )
    if all(sizes):
        names = joined([metric_info(metric).name for metric in main])
        text += f", in which the {sizes[0]} comparisons in {names} are one family and the other {sizes[1]} another."
    else:
        text += f" for all {sum(sizes)} comparisons." if sum(sizes) > 1 else "."
    if any(item.single for item in found):
        text += f" † One {sweep.unit.removesuffix('s')} only: the interval holds for these models, not for the method."
    return text
