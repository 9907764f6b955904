"""Reads a sweep's folder into runs and rows.

A *row* of the report is one configuration: all runs that differ only in their seed, in their overrides as well as in
their resolved configuration.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.errors import NoRunsError
from rlhf.files import EARLIER, FAILED, METRICS, SUMMARY
from rlhf.report.config_differences import split_by_config
from rlhf.report.recorded_run import RecordedRun, Steps
from rlhf.report.statistics import Array
from rlhf.tracking.reading import renamed_overrides, try_object, try_plan, try_summary

log = logging.getLogger(__name__)
SFT = "SFT"  # the label of the first row, the common step 0
PLAIN = "PPO"  # the label of a row without overrides
# metric → key of its values in a line of outcomes.jsonl
OUTCOME_KEYS = {
    "eval/win_rate": "win",
    "eval/gold_utility": "gold_utility",
    "eval/reward": "reward",
    "eval/response_tokens": "tokens",
    "eval/facts_per_response": "stated",
    "eval/factual_precision": "precision",
    "eval/factscore": "factscore",
}


@dataclass(frozen=True)
class Row:
    """The runs of one configuration at their last step, one per seed; with `step=0` the SFT row, one run at step 0."""

    label: str
    runs: tuple[RecordedRun, ...]
    step: int | None = None

    def is_called(self, name: str) -> bool:
        """Whether `name` in a layout is this row: its label, its overrides, one of them, or the value of one."""
        key = () if self.step == 0 else self.runs[0].key
        return name in (self.label, ", ".join(key)) or any(name in (item, item.partition("=")[2]) for item in key)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of its runs; () for the SFT row, which does not depend on PPO's seed."""
        return () if self.step == 0 else tuple(run.seed for run in self.runs)

    def values(self, metric: str) -> list[float]:
        """The value of a metric, final or at step 0, for each run that has it."""
        where = "sft_metrics" if self.step == 0 else "metrics"
        found = [(run.summary.get(where) or {}).get(metric) for run in self.runs]
        return [float(value) for value in found if value is not None]

    def outcomes(self, metric: str) -> Array | None:
        """[seeds, prompts] whose mean is the metric, with NaN for prompts that were not judged.

        None unless every run has the metric for the same number of prompts.
        """
        found = [_per_prompt(_at(run.outcomes, self.step), metric) for run in self.runs]
        by_seed = [values for values in found if values is not None]
        if not by_seed or len(by_seed) < len(found) or len({len(values) for values in by_seed}) > 1:
            return None
        return np.stack(by_seed)


@dataclass(frozen=True)
class Sweep:
    """The runs of one or more sweeps, and the rows of their report.

    Attributes:
        runs: every intended run, whatever its state.
        rows: the SFT row, then one row per configuration of finished runs.
        doubled: finished runs left out because another run of the row has the same seed.
        layout: the configuration's `report`: title, labels, columns, figures, baseline.
        unlike: finished runs left out because their configuration differs from their row's, with the differences.
    """

    runs: tuple[RecordedRun, ...]
    rows: tuple[Row, ...]
    doubled: tuple[RecordedRun, ...]
    layout: Mapping[str, Any]
    unlike: tuple[tuple[RecordedRun, list[str]], ...] = ()

    @property
    def finished(self) -> list[RecordedRun]:
        """The runs that ended and were evaluated."""
        return [run for run in self.runs if run.state == "finished"]

    @property
    def trained(self) -> tuple[Row, ...]:
        """All rows except the SFT row."""
        return self.rows[1:]


def load(folders: Sequence[Path]) -> Sweep:
    """Read one or more sweeps as one. The layout is that of the newest finished run.

    Raises:
        NoRunsError: a folder has no finished run.
    """
    # 1. All runs.
    runs: list[RecordedRun] = []
    for folder in folders:
        found = _load_folder(folder)
        if not any(run.state == "finished" for run in found):
            raise NoRunsError(f"{folder} holds no finished run (a run leaves summary.json when it ends)")
        runs += found
    finished = [run for run in runs if run.state == "finished"]
    newest = max(finished, key=lambda run: (run.folder / SUMMARY).stat().st_mtime)
    layout = newest.config.get("report") or {}
    # 2. Group the finished ones by their overrides without the seed.
    keyed: dict[tuple[str, ...], list[RecordedRun]] = {}
    for run in finished:
        keyed.setdefault(run.key, []).append(run)
    # 3. Make a row of each group, with runs of one configuration and one run per seed.
    labels, trained = layout.get("labels") or {}, list[Row]()
    doubled, unlike = list[RecordedRun](), list[tuple[RecordedRun, list[str]]]()
    for key, found in keyed.items():
        alike, others = split_by_config(found)
        unlike += others
        seeds: dict[int, RecordedRun] = {}
        for run in alike:
            if seeds.setdefault(run.seed, run) is not run:
                doubled.append(run)
        trained.append(Row(label(key, labels), tuple(run for _, run in sorted(seeds.items()))))
    rows = (Row(SFT, (trained[0].runs[0],), step=0), *trained)
    return Sweep(tuple(runs), rows, tuple(doubled), layout, tuple(unlike))


def label(key: Sequence[str], labels: Mapping[str, str]) -> str:
    """A row's label. The layout's `labels` may replace the whole key, an override, or the value of an override.

    Args:
        key: the overrides that the runs of the row share.
        labels: what to replace → by what.
    """
    whole = ", ".join(key) or PLAIN
    if whole in labels:
        return str(labels[whole])
    parts = [labels.get(item, labels.get(item.partition("=")[2], item)) for item in key]
    return ", ".join(map(str, parts)) or PLAIN


def _load_folder(folder: Path) -> list[RecordedRun]:
    """The runs of a sweep in the order of its plan, with those not begun; or the single run that the folder is."""
    plan, fault = try_plan(folder / "plan.json")
    if fault:
        log.warning("%s: %s", folder, fault)
    planned = {entry["folder"]: tuple(entry["overrides"]) for entry in plan}
    is_run = (folder / SUMMARY).exists()
    present = [folder] if is_run else sorted(path for path in folder.glob("*/") if _is_run(path))
    names = {path.name for path in present}
    runs = [_load_run(path, planned.get(path.name, ())) for path in present]
    runs += [
        RecordedRun(folder / name, overrides, "missing", "not begun")
        for name, overrides in planned.items()
        if name not in names
    ]
    order = {name: position for position, name in enumerate(planned)}
    return sorted(runs, key=lambda run: order.get(run.name, len(order)))


def _load_run(folder: Path, planned: tuple[str, ...]) -> RecordedRun:
    """A run and its state; `planned` are its overrides by the sweep's plan, in case it left none itself."""
    summary, fault = try_summary(folder / SUMMARY)
    failed, damaged = try_object(folder / FAILED)
    overrides = tuple(summary.get("overrides") or renamed_overrides(failed.get("overrides") or planned))
    if any(key.startswith("eval/") for key in summary.get("metrics") or {}):
        return RecordedRun(folder, overrides, "finished", summary=summary)
    if summary:
        return RecordedRun(folder, overrides, "unfinished", "it was not evaluated", summary)
    if fault:
        return RecordedRun(folder, overrides, "failed", f"{fault}: it cannot be reported on")
    if failed or damaged:
        return RecordedRun(folder, overrides, "failed", str(failed.get("error", damaged or "no reason given")))
    return RecordedRun(folder, overrides, "unfinished", "it has not ended")


def _is_run(folder: Path) -> bool:
    """Whether a folder is that of a run; `earlier/` holds runs that were moved aside, which do not count."""
    has_files = any((folder / name).exists() for name in (SUMMARY, FAILED, METRICS, ".hydra"))
    return has_files and folder.name != EARLIER


def _at(outcomes: Steps, step: int | None) -> dict[str, Any]:
    """The outcomes at a step, or at the last one (None); {} if there are none."""
    return outcomes.get(max(outcomes) if step is None and outcomes else step or 0, {})


def _per_prompt(outcome: Mapping[str, Any], metric: str) -> Array | None:
    """[prompts] whose mean is the metric, from a line of `outcomes.jsonl`; None if the line lacks it."""
    if metric == "eval/factual_precision" and "stated" in outcome and "true" in outcome:
        stated, true = (np.asarray(outcome[key], float) for key in ("stated", "true"))
        if not stated.sum():
            return None
        # The precision is a ratio of sums. Its linearisation has the same mean and, to first order, the same sampling
        # error (delta method).
        precision = true.sum() / stated.sum()
        return precision + (true - precision * stated) / stated.mean()
    values = outcome.get(OUTCOME_KEYS.get(metric, ""))
    return None if values is None else np.asarray(values, float)
