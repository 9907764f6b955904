"""A sweep's folder as runs and rows.

A *row* is all runs that differ in nothing but their seed, by their overrides and by their resolved configuration.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.errors import NoRunsError
from rlhf.files import EARLIER, FAILED, METRICS, SUMMARY
from rlhf.report.alike import divide
from rlhf.report.recorded import RecordedRun, Steps
from rlhf.report.statistics import Array
from rlhf.tracking.reading import renamed_overrides, try_object, try_plan, try_summary

log = logging.getLogger(__name__)
SFT = "SFT"
PLAIN = "PPO"  # the label of a row without overrides


@dataclass(frozen=True)
class Row:
    """A line of the table: the runs of one configuration at their end, or one run at step 0 (`step=0`: the SFT row)."""

    label: str
    runs: tuple[RecordedRun, ...]
    step: int | None = None

    def is_called(self, name: str) -> bool:
        """Whether a layout that says `name` means this row: its label, its overrides, or the value of one."""
        key = () if self.step == 0 else self.runs[0].key
        return name in (self.label, ", ".join(key)) or any(name in (item, item.partition("=")[2]) for item in key)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of its runs; none for SFT, which PPO's seed does not touch."""
        return () if self.step == 0 else tuple(run.seed for run in self.runs)

    def values(self, metric: str) -> list[float]:
        """A metric for each run that has it."""
        where = "sft_metrics" if self.step == 0 else "metrics"
        found = [(run.summary.get(where) or {}).get(metric) for run in self.runs]
        return [float(value) for value in found if value is not None]

    def outcomes(self, metric: str) -> Array | None:
        """[seeds, prompts] whose mean is the metric (NaN: not judged), or None where not every run has it."""
        rows = [_per_prompt(_at(run.outcomes, self.step), metric) for run in self.runs]
        present = [row for row in rows if row is not None]
        if not present or len(present) < len(rows) or len({len(row) for row in present}) > 1:
            return None
        return np.stack(present)


@dataclass(frozen=True)
class Sweep:
    """All that was found: `finished` runs in rows, the others with their state, and how the report is to look."""

    runs: tuple[RecordedRun, ...]
    rows: tuple[Row, ...]
    doubled: tuple[RecordedRun, ...]
    layout: Mapping[str, Any]
    unlike: tuple[tuple[RecordedRun, list[str]], ...] = ()  # left out of their row, with what they differ in

    @property
    def finished(self) -> list[RecordedRun]:
        """The runs with results."""
        return [run for run in self.runs if run.state == "finished"]

    @property
    def trained(self) -> tuple[Row, ...]:
        """The rows without SFT."""
        return self.rows[1:]


def load(folders: Sequence[Path]) -> Sweep:
    """Read the folders; the layout is that of the newest run."""
    runs: list[RecordedRun] = []
    for folder in folders:
        found = _load_folder(folder)
        if not any(run.state == "finished" for run in found):
            raise NoRunsError(f"{folder} holds no finished run (a run leaves summary.json when it ends)")
        runs += found
    finished = [run for run in runs if run.state == "finished"]
    newest = max(finished, key=lambda run: (run.folder / SUMMARY).stat().st_mtime)
    layout = newest.config.get("report") or {}
    keyed: dict[tuple[str, ...], list[RecordedRun]] = {}
    for run in finished:
        keyed.setdefault(run.key, []).append(run)
    labels, table = layout.get("labels") or {}, list[Row]()
    doubled, unlike = list[RecordedRun](), list[tuple[RecordedRun, list[str]]]()
    for key, found in keyed.items():
        alike, others = divide(found)
        unlike += others
        seeds: dict[int, RecordedRun] = {}
        for run in alike:
            if seeds.setdefault(run.seed, run) is not run:
                doubled.append(run)
        table.append(Row(label(key, labels), tuple(run for _, run in sorted(seeds.items()))))
    rows = (Row(SFT, (table[0].runs[0],), step=0), *table)
    return Sweep(tuple(runs), rows, tuple(doubled), layout, tuple(unlike))


def label(key: Sequence[str], labels: Mapping[str, str]) -> str:
    """A row's display text: the whole key, each override, or an override's value may be renamed."""
    whole = ", ".join(key) or PLAIN
    if whole in labels:
        return str(labels[whole])
    parts = [labels.get(item, labels.get(item.partition("=")[2], item)) for item in key]
    return ", ".join(map(str, parts)) or PLAIN


def _load_folder(folder: Path) -> list[RecordedRun]:
    plan, fault = try_plan(folder / "plan.json")
    if fault:
        log.warning("%s: %s", folder, fault)
    planned = {entry["folder"]: tuple(entry["overrides"]) for entry in plan}
    alone = (folder / SUMMARY).exists()
    present = [folder] if alone else sorted(path for path in folder.glob("*/") if _is_run(path))
    names = {path.name for path in present}
    runs = [_load_run(path, planned.get(path.name, ())) for path in present]
    runs += [
        RecordedRun(folder / name, said, "missing", "not begun") for name, said in planned.items() if name not in names
    ]
    order = {name: place for place, name in enumerate(planned)}
    return sorted(runs, key=lambda run: order.get(run.name, len(order)))


def _load_run(folder: Path, planned: tuple[str, ...]) -> RecordedRun:
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
    left = any((folder / name).exists() for name in (SUMMARY, FAILED, METRICS, ".hydra"))
    return left and folder.name != EARLIER


def _at(outcomes: Steps, step: int | None) -> dict[str, Any]:
    return outcomes.get(max(outcomes) if step is None and outcomes else step or 0, {})


KEYS = {
    "eval/win_rate": "win",
    "eval/gold_utility": "gold_utility",
    "eval/reward": "reward",
    "eval/response_tokens": "tokens",
    "eval/facts_per_response": "stated",
    "eval/factual_precision": "precision",
    "eval/factscore": "factscore",
}


def _per_prompt(outcome: Mapping[str, Any], metric: str) -> Array | None:
    """A number per instruction, with the metric as mean."""
    if metric == "eval/factual_precision" and "stated" in outcome and "true" in outcome:
        stated, true = (np.asarray(outcome[key], float) for key in ("stated", "true"))
        if not stated.sum():
            return None
        # a ratio of sums; its linearisation has the same mean and, to first order, the same sampling error
        precision = true.sum() / stated.sum()
        return precision + (true - precision * stated) / stated.mean()
    values = outcome.get(KEYS.get(metric, ""))
    return None if values is None else np.asarray(values, float)
