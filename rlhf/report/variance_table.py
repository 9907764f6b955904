"""The variance table: which source of luck dominates each metric, and what to buy next to see more clearly."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from rlhf.report.comparisons import baseline, compared_metrics, judged, pair_replicates
from rlhf.report.metric_info import metric_info
from rlhf.report.recorded_run import RecordedRun
from rlhf.report.results import columns
from rlhf.report.rows import Row
from rlhf.report.runs import Sweep
from rlhf.report.statistics import Array, deviation_range
from rlhf.report.tables import NOTHING, Cell, Number, Table
from rlhf.report.text import count
from rlhf.report.variance import Labels, Sources, estimate_sources
from rlhf.report.variance_design import Costs, Design

MORE_INSTRUCTIONS = 100
Value = TypeVar("Value", float, Array)


def variance_table(sweep: Sweep) -> Table | None:
    """One line per metric, then one for the paired differences in each compared metric; None if no row has two runs.

    It has the standard deviation over each source, the share of the largest in the variance of a row's mean, the
    standard error of that mean, and what this would be with one more of each source (built like the others), or with
    100 more instructions.
    """
    design = Design.of(sweep)
    if not design.depths or all(len(row.runs) < 2 for row in sweep.trained):
        return None
    header = ["metric", *(f"SD over {name}" for name in design.names), "SD over instructions", "largest source"]
    header += [
        "SE of a row",
        f"with 1 more {design.units[0]}",
        *(f"1 more {unit} in each" for unit in design.units[1:]),
    ]
    header += [f"{MORE_INSTRUCTIONS} more instructions", "buy next"]
    lines: list[Sequence[Cell]] = []
    asked: list[tuple[str, Row | None]] = [(metric, None) for metric in columns(sweep)]
    asked += [(metric, baseline(sweep)) for metric in compared_metrics(sweep) if pair_replicates(sweep)]
    costs = Costs.of(sweep)
    for metric, against in asked:
        sources = sources_of(sweep, design, metric, against)
        if sources is not None and sources.error > 0:
            lines.append(_line(design, costs, metric, sources, difference=against is not None))
    return Table(header, lines, _caption(design)) if lines else None


def sources_of(sweep: Sweep, design: Design, metric: str, against: Row | None = None) -> Sources | None:
    """The sources of variance of a metric; None if a run lacks it, or if it is not finite.

    With `against` it is those of the difference from the run of that row with the same seeds, run by run.
    """
    partners = {run.seeds: run for run in against.runs} if against else {}
    rows = [row for row in sweep.trained if row is not against]
    runs = [[run for run in row.runs if not against or run.seeds in partners] for row in rows]
    values, outcomes, numbers = list[float | None](), list[list[Array | None]](), list[tuple[int, RecordedRun]]()
    for number, (row, own) in enumerate(zip(rows, runs, strict=True)):
        numbers += [(number, run) for run in own]
        values += [_minus(row.value_of(run, metric), partners.get(run.seeds), row.value_of, metric) for run in own]
        outcomes.append(
            [_minus(row.outcome_of(run, metric), partners.get(run.seeds), row.outcome_of, metric) for run in own]
        )
    known = np.array(values, float)  # None becomes NaN
    if not len(known) or not np.isfinite(known).all():
        return None
    groups = [_labels([(number, run.seeds[:depth]) for number, run in numbers]) for depth in design.depths]
    return estimate_sources(known, np.array([number for number, _ in numbers]), groups, _matrices(outcomes))


def _minus(
    value: Value | None, partner: RecordedRun | None, read: Callable[[RecordedRun, str], Value | None], metric: str
) -> Value | None:
    """A run's value, or its difference from that of its partner; None if one of them is missing or of another size."""
    other = read(partner, metric) if partner else 0.0
    if value is None or other is None or (partner and np.shape(value) != np.shape(other)):
        return None
    return value - other


def _matrices(outcomes: Sequence[Sequence[Array | None]]) -> list[Array] | None:
    """For each row with runs, [runs, prompts] on the prompts judged in all runs; None if there are none."""
    lengths = {None if values is None else len(values) for row in outcomes for values in row}
    if len(lengths) != 1 or None in lengths:
        return None
    kept = judged(*(np.stack(row) for row in outcomes if row))  # type: ignore[arg-type]
    return kept if kept[0].shape[1] > 1 else None


def _line(design: Design, costs: Costs, metric: str, sources: Sources, difference: bool) -> list[Cell]:
    """The line of a metric or of its paired difference, in display units."""
    info, parts = metric_info(metric), sources.parts()
    names = [*design.names, "instructions"]
    largest = int(np.argmax(parts))
    offers = _offers(design, costs, sources)
    gains = {name: (sources.error**2 - offer.error**2) / cost for name, offer, cost in offers if cost}
    spreads = [np.sqrt(variance) for variance in sources.nested]
    spreads.append(np.sqrt(sources.instructions + sum(sources.interactions)) if sources.prompts else np.nan)
    errors = [offer.error for _, offer, _ in offers] + [np.nan] * (not sources.prompts)
    scaled = [
        Number(info.scale * float(number), digits=info.digits + 1) for number in (*spreads, sources.error, *errors)
    ]
    share = f"{names[largest]} ({100 * parts[largest] / sum(parts):.0f} %)"
    buy = max(gains, key=lambda name: gains[name]) if gains else NOTHING
    title = f"{info.title}, paired difference" if difference else info.title
    return [title, *scaled[: len(spreads)], share, *scaled[len(spreads) :], buy]


def _offers(design: Design, costs: Costs, sources: Sources) -> list[tuple[str, Sources, float]]:
    """What could be bought, the sources of variance with it, and its cost to a row in PPO runs (0: unknown)."""
    offers = [
        (f"a {unit}{' in each' if number else ''}", sources.with_more(number), costs.of_more(sources, design, number))
        for number, unit in enumerate(design.units)
    ]
    if sources.prompts:
        more = sources.with_prompts(sources.prompts + MORE_INSTRUCTIONS)
        offers.append(("instructions", more, costs.of_instructions(sources, MORE_INSTRUCTIONS)))
    return offers


def _labels(keys: Sequence[object]) -> Labels:
    """A number for each key, equal for equal keys."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys])


def _caption(design: Design) -> str:
    """How to read the table, and what its design cannot tell apart."""
    text = (
        "Standard deviations around a row, by source (nested, REML; taken to be the same in all rows), and of single"
        " responses over instructions (two-way analysis of variance, interactions included). The largest source is that"
        " of a row's mean, whose standard error (SE) follows: as it is, and as it would be with one more of a source,"
        " built like the others. “Buy next” takes the most variance away for its time: PPO runs, each row's share of"
        " building SFT and reward models, and evaluation, as far as the runs recorded them. A paired difference is from"
        " the baseline's run with the same seeds."
    )
    low, high = deviation_range(design.freedom)
    text += (
        f" That over {design.names[0]} rests on {count(design.freedom, 'degree')} of freedom: the true one may be"
        f" {low:.1f} to {high:.1f} times as large (95 %, chi-square)."
    )
    if any(name == "pipelines" or " with " in name for name in design.names):
        text += (
            " Stages whose seeds move together are one source: sft.seed, reward.seed and seed as axes of their own tell"
            " them apart (experiments=variance)."
        )
    if design.fixed:
        text += f" Not varied, so not counted: {', '.join(design.fixed)}."
    return text
