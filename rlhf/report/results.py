"""The main table of a report: the results of every row, and what its intervals count."""

import numpy as np

from rlhf.report.comparisons import WIN, compared_metrics, judged, mean_over, single_note
from rlhf.report.config_differences import differences
from rlhf.report.metric_info import COLUMNS, metric_info
from rlhf.report.rows import PPO_SEEDS, Row
from rlhf.report.runs import Sweep
from rlhf.report.statistics import covered, errors_for, judge_error, replicate_error
from rlhf.report.tables import NOTHING, Cell, Interval, Number, Table
from rlhf.tracking.reading import ADJUSTED, CONTROLLED

STARTS = ("sft", "model")  # the groups of the configuration that tell SFT models apart


def main_table(sweep: Sweep) -> Table:
    """One line per row: mean ± standard error over replicates of every metric.

    The first metric in which rows are compared gets its 95 % interval, too, and the win rate its standard error from
    the finite set of evaluation instructions. Metrics that no row has are left out, and those that are 0 in all of
    them, but not the win rate: to lose every comparison is a result.
    """
    bounded = compared_metrics(sweep)[:1]
    known = [metric for metric in columns(sweep) if any(np.isfinite(_all_values(sweep, metric)))]
    metrics = [metric for metric in known if metric in (*bounded, WIN) or any(_all_values(sweep, metric))]
    has_judge_error = WIN in metrics and any(row.outcomes(WIN) is not None for row in sweep.rows)
    nested = any(len(row.runs) > len(row.replicates) for row in sweep.trained)
    header = ["row", sweep.unit, *(["runs"] if nested else [])]
    for metric in metrics:
        header += [metric_info(metric).title, *(["95 % interval"] if metric in bounded else [])]
        header += ["judge SE (points)"] if metric == WIN and has_judge_error else []
    rows = []
    for row in sweep.rows:
        cells: list[Cell] = [row.label, len(row.replicates) or NOTHING, *([len(row.runs)] if nested else [])]
        for metric in metrics:
            cells += [mean_cell(row, metric), *([_interval_cell(row, metric)] if metric in bounded else [])]
            cells += [_judge_error_cell(row)] if metric == WIN and has_judge_error else []
        rows.append(cells)
    zero = [metric_info(metric).name for metric in known if metric not in metrics]
    better = {info.title: info.better for info in map(metric_info, metrics)}
    caption = _caption(sweep, has_judge_error) + (f" 0 in every row, and left out: {', '.join(zero)}." if zero else "")
    return Table(header, rows, caption, better).without_empty()


def _all_values(sweep: Sweep, metric: str) -> list[float]:
    """A metric of every replicate of every row."""
    return [value for row in sweep.rows for value in row.values(metric)]


def _caption(sweep: Sweep, has_judge_error: bool) -> str:
    """How to read the table, and the sentence that says what its intervals count and what not."""
    several = any(len(row.replicates) > 1 for row in sweep.rows)
    text = (
        f"Mean ± standard error over {sweep.unit} (none for a single one)." if several else f"Means over {sweep.unit}."
    )
    text += _coverage(sweep)
    text += (
        " ↑: higher is better, ↓: lower is better; bold: the best mean, which need not be distinguishable from others."
    )
    if has_judge_error:
        text += (
            " Judge SE: the win rate's standard error from the finite set of evaluation instructions, which all rows"
            " share; it is not part of ±."
        )
    return f"{text}{single_note(sweep)} {scope(sweep)}"


def scope(sweep: Sweep) -> str:
    """What the intervals of this report count, and what they do not cover."""
    counts = sorted({len(row.replicates) for row in sweep.trained})
    many = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    unit = sweep.unit.removesuffix("s") if counts[-1] == 1 else sweep.unit
    beyond = "they do not cover the choice of data or world, model size, judge and hyper-parameters."
    if sweep.depth == 1:
        return f"The 95 % intervals count {many} {unit}, from the SFT model on, and the instructions; {beyond}"
    of = " of PPO" if sweep.depth == PPO_SEEDS else ""
    return (
        f"{_shared_models(sweep)}: the 95 % intervals count {many} {unit}{of} and the instructions, and say nothing of"
        f" other such models, which may change a result by more (replicate=1,2,3 makes them); {beyond}"
    )


def _shared_models(sweep: Sweep) -> str:
    """Which models the replicates have in common, and whether those of different rows are the same."""
    runs = [run for row in sweep.trained for run in row.runs]
    # early versions did not record the reward model
    rewards = {run.summary.get("reward_model", "unknown") for run in runs}
    models = "one SFT model"
    if sweep.depth == PPO_SEEDS and rewards != {None}:
        models += " and one reward model" if None not in rewards else " and, if they need one, one reward model"
    one_start = all(not differences(runs[0], run, STARTS) for run in runs)
    one_reward = sweep.depth < PPO_SEEDS or len(rewards - {None}) < 2
    if one_start and one_reward:
        return f"All runs share {models}"
    return f"All runs of a row share {models}, but rows differ in theirs"


def _coverage(sweep: Sweep) -> str:
    """How often ± covers the true mean, for the smallest and largest number of replicates in the table.

    With few replicates this is less often than the 68 % and 95 % of a normal distribution that readers expect.
    """
    counts = sorted({len(row.replicates) for row in sweep.trained if len(row.replicates) > 1})
    sentences = [
        f" With {count} {sweep.unit} ± holds the true mean in {100 * covered(count, 1):.0f} % of cases and ±1.96"
        f" standard errors in {100 * covered(count, 1.96):.0f} %; for 95 % it takes ±{errors_for(count):.1f} of them."
        for count in dict.fromkeys((*counts[:1], *counts[-1:]))
    ]
    return "".join(sentences)


def columns(sweep: Sweep) -> list[str]:
    """The metrics of the main table: the layout's `columns`, or else `COLUMNS`.

    Early layouts list the length-adjusted win rate under its earlier name, length-controlled.
    """
    asked = list(sweep.layout.get("columns") or COLUMNS)
    renamed = not any(row.values(CONTROLLED) for row in sweep.rows)  # today CONTROLLED is another metric
    return list(dict.fromkeys(ADJUSTED if renamed and name == CONTROLLED else name for name in asked))


def mean_cell(row: Row, metric: str) -> Cell:
    """Mean ± standard error over replicates, in display units."""
    values, info = row.values(metric), metric_info(metric)
    if not values:
        return NOTHING
    return Number(info.scale * float(np.mean(values)), info.scale * replicate_error(values), info.digits)


def _interval_cell(row: Row, metric: str) -> Cell:
    """The 95 % interval of a row's mean, which counts replicates and instructions, in display units."""
    mean, info = mean_over(row, metric), metric_info(metric)
    if mean is None:
        return NOTHING
    return Interval(info.scale * mean.low, info.scale * mean.high, info.digits, "†" if row.single else "", signed=False)


def _judge_error_cell(row: Row) -> Cell:
    """The win rate's standard error from the finite set of instructions, in points."""
    outcomes, info = row.outcomes(WIN), metric_info(WIN)
    return NOTHING if outcomes is None else Number(info.scale * judge_error(judged(outcomes)[0]), digits=info.digits)
