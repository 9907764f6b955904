"""The warnings of a report: missing runs, suspicious numbers, findings of guards, mixed origins."""

import math
from collections.abc import Iterator
from typing import Any

from rlhf.files import OUTCOMES
from rlhf.report.environments import commits, mixed
from rlhf.report.metric_info import metric_info
from rlhf.report.recorded_run import RecordedRun
from rlhf.report.results import columns
from rlhf.report.rows import OUTCOME_KEYS
from rlhf.report.runs import Sweep
from rlhf.report.text import abridged, count, listing
from rlhf.tracking.seeds import Seeds

# the keys of a layout, `report` in the configuration
LAYOUT = ("title", "notes", "baseline", "labels", "columns", "distances", "pair_seeds", "tuning", "figures")
CUT_OFF = 0.2  # share of responses without an end of sequence above which a warning is due


def warnings(sweep: Sweep) -> list[str]:
    """One sentence per warning, the most serious first."""
    return [text for find in (left_out, _incomplete, _numbers, _guards, _replicates, _origin) for text in find(sweep)]


def left_out(sweep: Sweep) -> Iterator[str]:
    """Runs that failed, are missing or do not count, rows whose runs do not belong together, keys without effect."""
    for run in sweep.runs:
        if run.state == "failed":
            called = sweep.names[run.folder]
            yield f"“{called}” failed: {run.reason}" + (f" (its folder: {run.name})" if called != run.name else "")
    for state, words in (("unfinished", "not finished"), ("missing", "missing: not begun")):
        names = [sweep.names[run.folder] for run in sweep.runs if run.state == state]
        if names:
            yield f"{count(len(names), 'run')} {words}: {listing(names)}."
    if sweep.doubled:
        names = [str(run.folder) for run in sweep.doubled]
        yield f"Another run has the same row and seeds, so these are left out: {abridged(names)}."
    for run, differing in sweep.unlike:
        yield (
            f"{run.folder} is left out: it has the overrides of a row, but its configuration differs from that of the"
            f" row's other runs: {abridged(differing)}."
        )
    for row in sweep.trained:
        models: dict[Seeds, set[str]] = {}
        for run in row.runs:
            models.setdefault(run.seeds._replace(ppo=0), set()).add(str(run.summary.get("reward_model")))
        for names in map(sorted, models.values()):
            if len(names) > 1:
                yield (
                    f"Runs of “{row.label}” with equal seeds were trained on different reward models"
                    f" ({', '.join(names)}): data or code changed between them."
                )
    unknown = [str(key) for key in sweep.layout if key not in LAYOUT]
    if unknown:
        yield f"report.{', report.'.join(unknown)} has no effect; allowed: {', '.join(LAYOUT)}."
    if (name := sweep.layout.get("baseline")) and not any(row.is_called(name) for row in sweep.rows):
        yield f"The baseline {name} has no finished run: another row stands in for it."


def _incomplete(sweep: Sweep) -> Iterator[str]:
    """Means over fewer runs than their row has, and runs whose results per instruction do not count."""
    for row in sweep.rows:
        lacking: dict[tuple[str, ...], list[str]] = {}
        for metric in columns(sweep):
            without = tuple(sweep.names[run.folder] for run in row.runs if row.value_of(run, metric) is None)
            if 0 < len(without) < len(row.runs):
                lacking.setdefault(without, []).append(metric_info(metric).name)
        for without, names in lacking.items():
            yield f"“{row.label}”: {', '.join(names)} without {listing(without)}, of which it is not known."
    runs = [(row, run) for row in sweep.trained for run in row.runs]
    unlike: dict[str, list[str]] = {}
    for metric in OUTCOME_KEYS:
        known = [row.outcome_of(run, metric) is not None for row, run in runs]
        for (row, run), has in zip(runs, known, strict=True):
            if any(known) and not has and row.value_of(run, metric) is not None:
                unlike.setdefault(sweep.names[run.folder], []).append(metric_info(metric).name)
    for name, metrics in unlike.items():
        yield (
            f"“{name}” has no line in {OUTCOMES} of which its {', '.join(metrics)} would be the mean, so that "
            "intervals and comparisons that need the results per instruction are left out."
        )


def _numbers(sweep: Sweep) -> Iterator[str]:
    """Runs with non-finite metrics, and runs that ended with many responses cut off."""
    for run in sweep.finished:
        bad = {
            key: None  # a dict as an ordered set
            for values in (run.summary["metrics"], *run.metrics.values())
            for key, value in values.items()
            if isinstance(value, float) and not math.isfinite(value)
        }
        if bad:
            yield f"“{sweep.names[run.folder]}” has non-finite values in {', '.join(bad)}."
        steps = [step for step, values in run.metrics.items() if "ppo/missing_eos" in values]
        cut_off = run.metrics[max(steps)]["ppo/missing_eos"] if steps else 0.0
        if cut_off > CUT_OFF:
            yield (
                f"“{sweep.names[run.folder]}” ended with {100 * cut_off:.0f} % of its sampled responses cut off before"
                " their end: lengths and win rates are those of truncated texts (generation.max_new_tokens)."
            )


def _guards(sweep: Sweep) -> Iterator[str]:
    """One sentence per guard, with its message about the first run in which it found something."""
    found: dict[str, list[tuple[RecordedRun, dict[str, Any]]]] = {}
    for run in sweep.finished:
        for name, finding in (run.summary.get("guards") or {}).items():
            found.setdefault(name, []).append((run, finding))
    for name, runs in found.items():
        names, finding = [sweep.names[run.folder] for run, _ in runs], runs[0][1]
        where = f"in {len(runs)} runs ({listing(names)}), in the first of them" if len(runs) > 1 else f"in “{names[0]}”"
        yield f"The guard {name} found something {where} from step {finding['first_step']} on: {finding['message']}."


def _replicates(sweep: Sweep) -> Iterator[str]:
    """Rows with a single replicate or unequal numbers of them, and replicates that do not start at one SFT model."""
    one = sweep.unit.removesuffix("s")
    single = [row.label for row in sweep.trained if len(row.replicates) == 1]
    if single:
        which = f"{listing(single)} {'has' if len(single) == 1 else 'have'}"
        if len(single) == len(sweep.trained):
            which = "Every row has" if len(single) > 1 else "There is"
        yield f"{which} one {one} only, so that nothing is known of the spread over {sweep.unit}."
    counts = {len(row.replicates) for row in sweep.trained}
    if len(counts) > 1:
        yield f"The rows have different numbers of {sweep.unit} ({min(counts)} to {max(counts)})."
    for metric in ("eval/win_rate", "eval/response_tokens"):
        starts: dict[int, list[float]] = {}
        for run in sweep.finished:
            value = sweep.rows[0].value_of(run, metric)
            starts.setdefault(run.seeds.sft, []).extend([] if value is None else [value])
        if any(values and max(values) - min(values) > 1e-6 for values in starts.values()):
            yield (
                f"Runs with one sft.seed do not start from the same SFT model ({metric_info(metric).name} at step 0"
                " differs): the row SFT shows that of the first run."
            )
            return


def _origin(sweep: Sweep) -> Iterator[str]:
    """Runs that were not computed alike, or by uncommitted code."""
    yield from mixed(sweep)
    dirty = [commit for commit in commits(sweep.finished) if commit.endswith("+")]
    if dirty:
        yield f"The checkout had uncommitted changes ({', '.join(dirty)}): these numbers belong to no commit."
