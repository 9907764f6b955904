"""The two tables: what every row reached, and which rows can be told apart."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.report.measures import COLUMNS, measure
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
from rlhf.report.tables import NOTHING, Cell, Number, Table
from rlhf.report.tables import Interval as Ends
from rlhf.tracking.reading import ADJUSTED, CONTROLLED

WIN = "eval/win_rate"
MOST = 1000  # more runs or a hundred times more instructions than this nobody makes: printed as "more than"


@dataclass(frozen=True)
class Comparison:
    """A row against another in one metric; `stands` after Holm's correction for all comparisons of its family."""

    row: Row
    other: Row
    metric: str
    difference: Difference
    need: Need | None
    stands: bool

    @property
    def one_seed(self) -> bool:
        """Whether a trained row has a single run, so that nothing is known of its spread over seeds."""
        return any(row.step is None and len(row.runs) == 1 for row in (self.row, self.other))


def main_table(sweep: Sweep) -> Table:
    """A line per row: mean ± standard error over seeds; for the win rate also what the finite evaluation set adds."""
    metrics = [metric for metric in columns(sweep) if any(row.values(metric) for row in sweep.rows)]
    judged = WIN in metrics and any(row.outcomes(WIN) is not None for row in sweep.rows)
    header = ["row", "seeds"]
    for metric in metrics:
        header += [measure(metric).title] + (["judge SE (points)"] if metric == WIN and judged else [])
    rows = []
    for row in sweep.rows:
        cells: list[Cell] = [row.label, len(row.seeds) or NOTHING]
        for metric in metrics:
            cells.append(_mean(row, metric))
            if metric == WIN and judged:
                cells.append(_judge(row))
        rows.append(cells)
    caption = "Mean ± standard error over seeds (bootstrap; none for one seed)." + _coverage(sweep)
    if judged:
        caption += (
            " Judge SE: the win rate's standard error from the finite set of evaluation instructions, which all rows"
            " share; it is not part of ±."
        )
    return Table(header, rows, caption)


def _coverage(sweep: Sweep) -> str:
    """What ± covers with the seeds at hand: less than a reader who thinks of many would expect."""
    counts = sorted({len(row.seeds) for row in sweep.trained if len(row.seeds) > 1})
    said = [
        f" With {seeds} seeds ± holds the true mean in {100 * covered(seeds, 1):.0f} % of cases and ±1.96 standard"
        f" errors in {100 * covered(seeds, 1.96):.0f} %; for 95 % it takes ±{errors_for(seeds):.1f} of them."
        for seeds in dict.fromkeys((*counts[:1], *counts[-1:]))
    ]
    return "".join(said)


def columns(sweep: Sweep) -> list[str]:
    """The metrics that the layout asks for, or all that people know; those of earlier layouts by today's names."""
    asked = list(sweep.layout.get("columns") or COLUMNS)
    renamed = not any(row.values(CONTROLLED) for row in sweep.rows)
    return list(dict.fromkeys(ADJUSTED if renamed and name == CONTROLLED else name for name in asked))


def baseline(sweep: Sweep) -> Row:
    """The row that the others are compared with."""
    name = sweep.layout.get("baseline")
    named = [row for row in sweep.rows if name and row.is_called(name)]
    return (named or list(sweep.trained))[0]


def compared(sweep: Sweep) -> list[str]:
    """The metrics to compare rows in: the layout's columns, else the win rate, else the next best that is there."""

    def known(metric: str) -> bool:
        return all(row.outcomes(metric) is not None for row in sweep.rows)

    asked = sweep.layout.get("columns")
    if asked:
        return [metric for metric in asked if known(metric)]
    return [metric for metric in (WIN, "eval/gold_utility", "eval/reward") if known(metric)][:1]


def pair_seeds(sweep: Sweep) -> bool:
    """Whether runs of the same seed are compared with each other.

    Always valid, but it halves the degrees of freedom: with three seeds it pays only where runs of the same seed are
    alike (a correlation above about 0.6). `report.pair_seeds: true` takes them as pairs.
    """
    return bool(sweep.layout.get("pair_seeds", False))


def comparisons(sweep: Sweep, against: Row, metrics: Sequence[str]) -> list[Comparison]:
    """Every other row against one row, as one family for Holm's correction."""
    found = []
    for metric in metrics:
        b = against.outcomes(metric)
        for row in sweep.rows:
            a = row.outcomes(metric)
            if row is against or a is None or b is None or a.shape[1] != b.shape[1]:
                continue
            a, judged_b = judged(a, b)
            if a.shape[1] < 2:
                continue
            paired = pair_seeds(sweep) and row.seeds == against.seeds and len(row.seeds) > 1
            told = difference(a, judged_b, paired)
            open_question = told.verdict == "not distinguishable"
            need = seeds_needed(a, judged_b, paired) if open_question else None
            found.append((row, metric, told, need))
    stands = holm([told.p_value for _, _, told, _ in found])
    return [
        Comparison(row, against, metric, told, need, stand)
        for (row, metric, told, need), stand in zip(found, stands, strict=True)
    ]


def judged(*outcomes: Array) -> list[Array]:
    """Only the instructions that were judged in every run of all of them (some judges' answers cannot be read)."""
    kept = ~np.any([np.isnan(rows).any(axis=0) for rows in outcomes], axis=0)
    return [rows[:, kept] for rows in outcomes]


def difference_table(sweep: Sweep, found: Sequence[Comparison], against: Row) -> Table:
    """Each row against the baseline."""
    several = len({item.metric for item in found}) > 1
    header = ["row", *(["metric"] if several else []), "difference", "95 % interval", "verdict", "after Holm"]
    header += ["to tell it at 80 % power"]
    rows: list[list[Cell]] = []
    for item in found:
        words, told = measure(item.metric), item.difference
        value = Number(words.scale * told.mean, digits=words.digits, signed=True)
        ends = Ends(words.scale * told.low, words.scale * told.high, words.digits, "†" if item.one_seed else "")
        name = [words.title] if several else []
        holds = "stands" if item.stands else ("falls" if told.verdict != "not distinguishable" else NOTHING)
        rows.append([item.row.label, *name, value, ends, told.verdict, holds, needed(item)])
    return Table(header, rows, _caption(sweep, found, against, several))


def needed(item: Comparison) -> str:
    """What it would take, in words."""
    if item.need is None:
        return NOTHING
    many = f"{_seeds(item.need.seeds)} seeds"
    if item.need.fewest <= MOST and item.need.fewest < item.need.most:
        many += f" ({_seeds(item.need.fewest)} to {_seeds(item.need.most)})"
    if item.need.instructions is None:
        return many
    most = 100 * MOST
    wide = f"more than {most:,}" if item.need.instructions > most else f"{item.need.instructions:,}"
    return f"{wide} instructions and {many}"


def _seeds(count: int) -> str:
    return f"more than {MOST:,}" if count > MOST else f"{count:,}"


def _caption(sweep: Sweep, found: Sequence[Comparison], against: Row, several: bool) -> str:
    unit = "" if several or not found else f" in {measure(found[0].metric).name}"
    points = "" if several or not found else measure(found[0].metric).points
    paired = "paired by instruction" + (" and, where both rows have the same, by seed" if pair_seeds(sweep) else "")
    made = "1 comparison was" if len(found) == 1 else f"{len(found)} comparisons were"
    text = (
        f"Each row minus “{against.label}”{unit}{f' ({points})' if points else ''}, {paired};"
        " 95 % intervals count both as samples (pigeonhole bootstrap, Student's t); with few seeds they cover 93 to"
        " 97 %, least where seeds are paired or the row with fewer seeds scatters more."
        f" {made} made; of the verdicts that name a direction, “stands” survives Holm's correction for all of them and"
        " “falls” does not."
        " The last column takes the observed gap for the true one. Its range counts only how little a few seeds tell of"
        " their spread (80 %, chi-square); as the gap is uncertain too, the truth may lie far outside."
    )
    if any(item.one_seed for item in found):
        text += " † A row has one seed only: the interval holds for these models, not for the method."
    return text


def _mean(row: Row, metric: str) -> Cell:
    values, words = row.values(metric), measure(metric)
    if not values:
        return NOTHING
    return Number(words.scale * float(np.mean(values)), words.scale * seed_error(values), words.digits)


def _judge(row: Row) -> Cell:
    outcomes, words = row.outcomes(WIN), measure(WIN)
    return NOTHING if outcomes is None else Number(words.scale * judge_error(judged(outcomes)[0]), digits=words.digits)
