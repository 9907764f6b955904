"""The two tables of a report: the results of every row, and the differences from a baseline row."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.report.metric_info import EVAL_METRICS, metric_info
from rlhf.report.runs import Row, Sweep
from rlhf.report.statistics import (
    Array,
    Difference,
    Need,
    covered,
    difference,
    errors_for,
    holm,
    judge_error,
    seed_error,
    seeds_needed,
)
from rlhf.report.tables import NOTHING, Cell, Interval, Number, Table
from rlhf.tracking.reading import ADJUSTED, CONTROLLED

WIN = "eval/win_rate"
# Numbers of seeds above this are impractical and printed as "more than 1,000"; for instructions 100 times as many.
MOST_SEEDS = 1000
MOST_INSTRUCTIONS = 100 * MOST_SEEDS


@dataclass(frozen=True)
class Comparison:
    """The difference between two rows in one metric.

    `need` says what it would take to tell them apart, if they cannot be told apart now. `stands` says whether the
    difference is significant after Holm's correction for all comparisons of its family.
    """

    row: Row
    other: Row
    metric: str
    difference: Difference
    need: Need | None
    stands: bool

    @property
    def one_seed(self) -> bool:
        """Whether one of the trained rows has a single run, so that its spread over seeds is unknown."""
        return any(row.step is None and len(row.runs) == 1 for row in (self.row, self.other))


def main_table(sweep: Sweep) -> Table:
    """One line per row: mean ± standard error over seeds of every metric.

    The win rate gets a second column: its standard error from the finite set of evaluation instructions.
    """
    metrics = [metric for metric in columns(sweep) if any(row.values(metric) for row in sweep.rows)]
    has_judge_error = WIN in metrics and any(row.outcomes(WIN) is not None for row in sweep.rows)
    header = ["row", "seeds"]
    for metric in metrics:
        header += [metric_info(metric).title] + (["judge SE (points)"] if metric == WIN and has_judge_error else [])
    rows = []
    for row in sweep.rows:
        cells: list[Cell] = [row.label, len(row.seeds) or NOTHING]
        for metric in metrics:
            cells.append(_mean_cell(row, metric))
            if metric == WIN and has_judge_error:
                cells.append(_judge_error_cell(row))
        rows.append(cells)
    caption = "Mean ± standard error over seeds (bootstrap; none for one seed)." + _coverage(sweep)
    if has_judge_error:
        caption += (
            " Judge SE: the win rate's standard error from the finite set of evaluation instructions, which all rows"
            " share; it is not part of ±."
        )
    return Table(header, rows, caption)


def _coverage(sweep: Sweep) -> str:
    """How often ± covers the true mean, for the smallest and largest number of seeds in the table.

    With few seeds this is less often than the 68 % and 95 % of a normal distribution that readers expect.
    """
    counts = sorted({len(row.seeds) for row in sweep.trained if len(row.seeds) > 1})
    sentences = [
        f" With {seeds} seeds ± holds the true mean in {100 * covered(seeds, 1):.0f} % of cases and ±1.96 standard"
        f" errors in {100 * covered(seeds, 1.96):.0f} %; for 95 % it takes ±{errors_for(seeds):.1f} of them."
        for seeds in dict.fromkeys((*counts[:1], *counts[-1:]))
    ]
    return "".join(sentences)


def columns(sweep: Sweep) -> list[str]:
    """The metrics of the main table: the layout's `columns`, or else `EVAL_METRICS`.

    Early layouts list the length-adjusted win rate under its earlier name, length-controlled.
    """
    asked = list(sweep.layout.get("columns") or EVAL_METRICS)
    renamed = not any(row.values(CONTROLLED) for row in sweep.rows)  # today CONTROLLED is another metric
    return list(dict.fromkeys(ADJUSTED if renamed and name == CONTROLLED else name for name in asked))


def baseline(sweep: Sweep) -> Row:
    """The row that the others are compared with: the one that the layout names, or else the first trained row."""
    name = sweep.layout.get("baseline")
    named = [row for row in sweep.rows if name and row.is_called(name)]
    return (named or list(sweep.trained))[0]


def compared_metrics(sweep: Sweep) -> list[str]:
    """The metrics in which rows are compared: those of the layout's `columns` that have a value per instruction.

    Without `columns` it is the win rate, or else the gold utility, or else the learned reward.
    """

    def known(metric: str) -> bool:
        return all(row.outcomes(metric) is not None for row in sweep.rows)

    asked = sweep.layout.get("columns")
    if asked:
        return [metric for metric in asked if known(metric)]
    return [metric for metric in (WIN, "eval/gold_utility", "eval/reward") if known(metric)][:1]


def pair_seeds(sweep: Sweep) -> bool:
    """Whether runs of the same seed are compared as pairs (`report.pair_seeds`; false by default).

    Pairing is always valid, but it halves the degrees of freedom: with three seeds it pays only if runs of the same
    seed are similar (a correlation above about 0.6).
    """
    return bool(sweep.layout.get("pair_seeds", False))


def comparisons(sweep: Sweep, against: Row, metrics: Sequence[str]) -> list[Comparison]:
    """Compare every other row with `against` in each metric, as one family for Holm's correction.

    Rows without a value per instruction, or with too few instructions in common, are left out.
    """
    found = []
    for metric in metrics:
        b = against.outcomes(metric)
        for row in sweep.rows:
            a = row.outcomes(metric)
            if row is against or a is None or b is None or a.shape[1] != b.shape[1]:
                continue
            a, common_b = judged(a, b)
            if a.shape[1] < 2:
                continue
            # the SFT row has no seeds to pair
            paired = pair_seeds(sweep) and row.seeds == against.seeds and len(row.seeds) > 1
            gap = difference(a, common_b, paired)
            need = seeds_needed(a, common_b, paired) if gap.verdict == "not distinguishable" else None
            found.append((row, metric, gap, need))
    stands = holm([gap.p_value for _, _, gap, _ in found])
    return [
        Comparison(row, against, metric, gap, need, stand)
        for (row, metric, gap, need), stand in zip(found, stands, strict=True)
    ]


def judged(*outcomes: Array) -> list[Array]:
    """Keep the instructions that were judged in every run of all matrices [seeds, prompts].

    NaN marks an instruction for which the judge's answer could not be parsed.
    """
    kept = ~np.any([np.isnan(rows).any(axis=0) for rows in outcomes], axis=0)
    return [rows[:, kept] for rows in outcomes]


def difference_table(sweep: Sweep, found: Sequence[Comparison], against: Row) -> Table:
    """One line per comparison: the difference from the baseline, its interval, and what may be concluded from it."""
    several = len({item.metric for item in found}) > 1
    header = ["row", *(["metric"] if several else []), "difference", "95 % interval", "verdict", "after Holm"]
    header += ["to tell it at 80 % power"]
    rows: list[list[Cell]] = []
    for item in found:
        info, gap = metric_info(item.metric), item.difference
        value = Number(info.scale * gap.mean, digits=info.digits, signed=True)
        interval = Interval(info.scale * gap.low, info.scale * gap.high, info.digits, "†" if item.one_seed else "")
        name = [info.title] if several else []
        corrected = "stands" if item.stands else ("falls" if gap.verdict != "not distinguishable" else NOTHING)
        rows.append([item.row.label, *name, value, interval, gap.verdict, corrected, _needed(item)])
    return Table(header, rows, _difference_caption(sweep, found, against, several))


def _needed(item: Comparison) -> str:
    """The seeds and instructions needed to tell two rows apart, in words; "–" if they can be told apart now."""
    if item.need is None:
        return NOTHING
    need = item.need
    seeds = f"{_at_most(need.seeds, MOST_SEEDS)} seeds"
    if need.fewest <= MOST_SEEDS and need.fewest < need.most:
        seeds += f" ({_at_most(need.fewest, MOST_SEEDS)} to {_at_most(need.most, MOST_SEEDS)})"
    if need.instructions is None:
        return seeds
    return f"{_at_most(need.instructions, MOST_INSTRUCTIONS)} instructions and {seeds}"


def _at_most(count: int, limit: int) -> str:
    """A number, or "more than" the limit."""
    return f"more than {limit:,}" if count > limit else f"{count:,}"


def _difference_caption(sweep: Sweep, found: Sequence[Comparison], against: Row, several: bool) -> str:
    """How to read the table of differences; `several` says that it has more than one metric."""
    # with several metrics, name and unit are in a column of their own
    metric = "" if several or not found else f" in {metric_info(found[0].metric).name}"
    points = "" if several or not found else metric_info(found[0].metric).points
    paired = "paired by instruction" + (" and, where both rows have the same, by seed" if pair_seeds(sweep) else "")
    made = "1 comparison was" if len(found) == 1 else f"{len(found)} comparisons were"
    text = (
        f"Each row minus “{against.label}”{metric}{f' ({points})' if points else ''}, {paired};"
        " the 95 % intervals treat seeds and instructions as samples (pigeonhole bootstrap, Student's t). With few"
        " seeds they cover 93 to 97 %, least if seeds are paired or if the row with fewer seeds varies more."
        f" {made} made; of the verdicts that name a direction, “stands” remains significant after Holm's correction for"
        " all of them and “falls” does not."
        " The last column takes the observed difference for the true one. Its range (80 %, chi-square) reflects only"
        " how uncertain the spread over a few seeds is; as the difference is uncertain too, the true number may lie far"
        " outside."
    )
    if any(item.one_seed for item in found):
        text += " † One of the rows has one seed only: the interval holds for these models, not for the method."
    return text


def _mean_cell(row: Row, metric: str) -> Cell:
    """Mean ± standard error over seeds, in display units."""
    values, info = row.values(metric), metric_info(metric)
    if not values:
        return NOTHING
    return Number(info.scale * float(np.mean(values)), info.scale * seed_error(values), info.digits)


def _judge_error_cell(row: Row) -> Cell:
    """The win rate's standard error from the finite set of instructions, in points."""
    outcomes, info = row.outcomes(WIN), metric_info(WIN)
    return NOTHING if outcomes is None else Number(info.scale * judge_error(judged(outcomes)[0]), digits=info.digits)
