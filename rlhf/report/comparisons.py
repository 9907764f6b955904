"""The table of differences from a baseline row, and the comparisons behind it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlhf.report.metric_info import metric_info
from rlhf.report.rows import PPO_SEEDS, Row
from rlhf.report.runs import Sweep
from rlhf.report.statistics import Array, Estimate, Need, difference, holm, mean_of, replicates_needed
from rlhf.report.tables import NOTHING, Cell, Interval, Number, Table

WIN = "eval/win_rate"
# Numbers of replicates above this are impractical and printed as "more than 1,000"; of instructions 100 times as many.
MOST_REPLICATES = 1000
MOST_INSTRUCTIONS = 100 * MOST_REPLICATES


@dataclass(frozen=True)
class Comparison:
    """The difference between two rows in one metric.

    Attributes:
        row: the row.
        other: what is subtracted from it.
        metric: in which they are compared.
        difference: over the replicates that both rows have if they are compared as pairs, else over all.
        unpaired: the same as if the replicates of the two rows had nothing in common; None if they are not paired.
        need: what it would take to tell the rows apart, if they cannot be told apart now.
        stands: whether it is significant after Holm's correction for all comparisons of its family.
    """

    row: Row
    other: Row
    metric: str
    difference: Estimate
    unpaired: Estimate | None
    need: Need | None
    stands: bool = False

    @property
    def single(self) -> bool:
        """Whether one of the rows has a single replicate."""
        return self.row.single or self.other.single


def baseline(sweep: Sweep) -> Row:
    """The trained row that the others are compared with: the one that the layout names, or else the first one."""
    return _named(sweep) or sweep.trained[0]


def origins(sweep: Sweep) -> list[Row]:
    """What rows are compared with: SFT, from which all of them start, then the baseline if the layout names one."""
    named = _named(sweep)
    return [sweep.rows[0], *([named] if named and len(sweep.trained) > 1 else [])]


def _named(sweep: Sweep) -> Row | None:
    """The trained row that the layout calls the baseline."""
    name = sweep.layout.get("baseline")
    return next((row for row in sweep.trained if name and row.is_called(name)), None)


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


def pair_replicates(sweep: Sweep) -> bool:
    """Whether equal replicates of two rows are compared as pairs.

    Rows of one pipeline share its SFT model and reward model, whose luck pairing takes out of their difference. Mere
    seeds of PPO share no model, so that pairing would only halve the degrees of freedom: `report.pair_seeds` asks for
    it. It is valid, but with three seeds it pays only if their correlation is above about 0.6.
    """
    return sweep.depth < PPO_SEEDS or bool(sweep.layout.get("pair_seeds", False))


def comparisons(sweep: Sweep, against: Row, metrics: Sequence[str]) -> list[Comparison]:
    """Compare every other trained row with `against` in each metric, as one family for Holm's correction.

    Rows without a value per instruction, or with too few instructions in common, are left out.
    """
    pairs = [(row, metric) for metric in metrics for row in sweep.trained if row is not against]
    found = [compare(row, against, metric, pair_replicates(sweep)) for row, metric in pairs]
    return corrected([item for item in found if item])


def compare(row: Row, other: Row, metric: str, pair: bool) -> Comparison | None:
    """Compare two rows, before any correction; None if they lack outcomes on the same two or more instructions."""
    a, b = row.outcomes(metric), other.outcomes(metric)
    if a is None or b is None or a.shape[1] != b.shape[1]:
        return None
    common = [key for key in row.replicates if key in other.replicates] if pair else []
    a, b = judged(a, b)
    if a.shape[1] < 2:
        return None
    gap, unpaired, paired = difference(a, b, paired=False), None, len(common) > 1
    if paired:
        a, b = judged(row.outcomes(metric, common), other.outcomes(metric, common))  # type: ignore[arg-type]
        gap, unpaired = difference(a, b, paired=True), gap
    need = replicates_needed(a, b, paired) if gap.verdict == "not distinguishable" else None
    return Comparison(row, other, metric, gap, unpaired, need)


def corrected(found: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons of one family with `stands` set by Holm's correction."""
    stands = holm([item.difference.p_value for item in found])
    return [replace(item, stands=stand) for item, stand in zip(found, stands, strict=True)]


def judged(*outcomes: Array) -> list[Array]:
    """Keep the instructions that were judged in every run of all matrices [replicates, prompts].

    NaN marks an instruction for which the judge's answer could not be parsed.
    """
    kept = ~np.any([np.isnan(rows).any(axis=0) for rows in outcomes], axis=0)
    return [rows[:, kept] for rows in outcomes]


def mean_over(row: Row, metric: str) -> Estimate | None:
    """The mean of a row, whose interval counts replicates and instructions; None below two judged instructions."""
    outcomes = row.outcomes(metric)
    kept = None if outcomes is None else judged(outcomes)[0]
    return None if kept is None or kept.shape[1] < 2 else mean_of(kept)


def single_note(sweep: Sweep) -> str:
    """What the mark † of a mean over a single replicate means, if there is one."""
    if not any(row.single for row in sweep.rows):
        return ""
    return f" † One {sweep.unit.removesuffix('s')} only: the interval counts nothing but the instructions."


def difference_table(sweep: Sweep, found: Sequence[Comparison], against: Row) -> Table:
    """One line per comparison: the difference from the baseline, its interval, and what may be concluded from it."""
    several, paired = len({item.metric for item in found}) > 1, any(item.unpaired for item in found)
    header = ["row", *(["metric"] if several else []), "difference", "95 % interval"]
    header += ["unpaired interval"] if paired else []
    corrections = len(found) > 1  # the correction of a single comparison changes nothing
    header += ["verdict", *(["after Holm"] if corrections else []), "to tell it at 80 % power"]
    rows: list[list[Cell]] = []
    for item in found:
        info, gap = metric_info(item.metric), item.difference
        value = Number(info.scale * gap.mean, digits=info.digits, signed=True)
        name = [info.title] if several else []
        unpaired = [interval_cell(item, item.unpaired) if item.unpaired else NOTHING] if paired else []
        verdict = [gap.verdict, *([holm_cell(item)] if corrections else []), needed(item, sweep.unit)]
        rows.append([item.row.label, *name, value, interval_cell(item, gap), *unpaired, *verdict])
    return Table(header, rows, _difference_caption(sweep, found, against, several))


def interval_cell(item: Comparison, gap: Estimate) -> Interval:
    """The interval of a difference in display units, marked if a row has a single replicate."""
    info = metric_info(item.metric)
    return Interval(info.scale * gap.low, info.scale * gap.high, info.digits, "†" if item.single else "")


def holm_cell(item: Comparison) -> str:
    """Whether a verdict that names a direction is significant after Holm's correction."""
    return "stands" if item.stands else ("falls" if item.difference.verdict != "not distinguishable" else NOTHING)


def needed(item: Comparison, unit: str) -> str:
    """The replicates and instructions needed to tell two rows apart, in words; "–" if they can be told apart now."""
    if item.need is None:
        return NOTHING
    need = item.need
    replicates = f"{_at_most(need.replicates, MOST_REPLICATES)} {unit}"
    if need.fewest <= MOST_REPLICATES and need.fewest < need.most:
        replicates += f" ({_at_most(need.fewest, MOST_REPLICATES)} to {_at_most(need.most, MOST_REPLICATES)})"
    if need.instructions is None:
        return replicates
    return f"{_at_most(need.instructions, MOST_INSTRUCTIONS)} instructions and {replicates}"


def _at_most(count: int, limit: int) -> str:
    """A number, or "more than" the limit."""
    return f"more than {limit:,}" if count > limit else f"{count:,}"


def _difference_caption(sweep: Sweep, found: Sequence[Comparison], against: Row, several: bool) -> str:
    """How to read the table of differences; `several` says that it has more than one metric."""
    # with several metrics, name and unit are in a column of their own
    metric = "" if several or not found else f" in {metric_info(found[0].metric).name}"
    points = "" if several or not found else metric_info(found[0].metric).points
    one = sweep.unit.removesuffix("s")
    paired = "paired by instruction"
    paired += f" and, where both rows have the same, by {one}" if pair_replicates(sweep) else ""
    text = (
        f"Each row minus “{against.label}”{metric}{f' ({points})' if points else ''}, {paired};"
        f" the 95 % intervals treat {sweep.unit} and instructions as samples (analysis of variance, Student's t)."
    )
    if any(item.unpaired for item in found):
        text += (
            f" The unpaired interval is that of rows made by different {sweep.unit}: where it is wider, that much of"
            f" the spread is luck that the rows of a {one} have in common."
        )
    if len(found) > 1:
        text += (
            f" {len(found)} comparisons were made; of the verdicts that name a direction, “stands” remains significant"
            " after Holm's correction for all of them and “falls” does not."
        )
    if any(item.need for item in found):
        text += (
            " The last column takes the observed difference for the true one. Its range (80 %, chi-square) reflects"
            f" only how uncertain the spread over a few {sweep.unit} is; as the difference is uncertain too, the true"
            " number may lie far outside."
        )
    if any(item.single for item in found):
        text += f" † One of the rows has one {one} only: the interval holds for these models, not for the method."
    return text
