"""What a comparison of rows says, in words."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from rlhf.report.comparisons import Comparison, compare, corrected, pair_replicates
from rlhf.report.metric_info import metric_info
from rlhf.report.rows import Row
from rlhf.report.runs import Sweep
from rlhf.report.text import joined, listing


def value(row: Row, metric: str) -> str:
    """A row's mean in a metric, with its unit."""
    info, values = metric_info(metric), row.values(metric)
    if not values:
        return "unknown"
    number = f"{info.scale * float(np.mean(values)):.{info.digits}f}".replace("-", "−")
    return f"{number} {info.unit}".strip()


def best_of(rows: Sequence[Row], metric: str) -> tuple[Row, str, str]:
    """The row with the best mean, and how its mean and those of worse rows are called: highest, lower."""
    if metric_info(metric).better == "↓":
        return min(rows, key=lambda row: float(np.mean(row.values(metric)))), "lowest", "higher"
    return max(rows, key=lambda row: float(np.mean(row.values(metric)))), "highest", "lower"


def rivals_of(sweep: Sweep, best: Row, rows: Sequence[Row], metric: str) -> tuple[list[Comparison], int]:
    """The comparisons with the best row, corrected for all pairs of rows, and the number of these.

    Which row is best is known only afterwards, so that a family of its comparisons alone would be too small.
    """
    pairs = [(row, best) for row in rows if row is not best]
    pairs += combinations([row for row, _ in pairs], 2)
    found = [compare(row, other, metric, pair_replicates(sweep)) for row, other in pairs]
    family = corrected([item for item in found if item])
    return [item for item in family if item.other is best], len(family)


def told_from_best(rivals: Sequence[Comparison], worse: str) -> str:
    """Which of the other rows are significantly worse than the best one, in words."""
    below = [item.row.label for item in rivals if item.difference.verdict == worse and item.stands]
    same = [item.row.label for item in rivals if item.row.label not in below]
    if len(rivals) == 1:
        told = f"is significantly {worse}" if below else "cannot be told from it"
        return f"The only other row, “{rivals[0].row.label}”, {told}"
    if not below:
        none = "Neither of the other two" if len(rivals) == 2 else f"None of the other {len(rivals)}"
        return f"{none} rows is significantly {worse}"
    if not same:
        every = "Both other" if len(rivals) == 2 else f"All other {len(rivals)}"
        return f"{every} rows are significantly {worse}"
    verb = "is" if len(below) == 1 else "are"
    text = f"Of the other {len(rivals)} rows, {len(below)} {verb} significantly {worse}: {listing(below)}"
    return f"{text}; {listing(same)} cannot be told from the best"


def listing_with_gaps(items: Sequence[Comparison]) -> str:
    """The rows of comparisons with their differences, the first five."""
    unit = metric_info(items[0].metric).points
    texts = [f"“{item.row.label}” ({f'{signed(item, item.difference.mean)} {unit}'.strip()})" for item in items[:5]]
    return joined([*texts, *([f"{len(items) - 5} more"] if len(items) > 5 else [])])


def signed(item: Comparison, number: float) -> str:
    """A difference in display units with its sign."""
    info = metric_info(item.metric)
    text = f"{info.scale * number:+.{info.digits}f}".replace("-", "−")
    return text if text.strip("+−0.") else text[1:]
