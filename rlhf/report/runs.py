"""Reads a sweep's folder into runs and rows.

A *row* of the report is one configuration: all runs that differ only in their seeds (`rlhf.tracking.seeds`), in their
overrides as well as in their resolved configuration.
"""

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf.errors import NoRunsError
from rlhf.files import EARLIER, FAILED, METRICS, PLAN, SUMMARY
from rlhf.report.config_differences import split_by_config
from rlhf.report.evaluation_shown import with_evaluation
from rlhf.report.recorded_run import RecordedRun
from rlhf.report.rows import PPO_SEEDS, REPLICATES, Row, depth_of
from rlhf.tracking.overrides import in_all
from rlhf.tracking.reading import renamed_overrides, try_object, try_plan, try_summary
from rlhf.tracking.seeds import Seeds

log = logging.getLogger(__name__)
SFT = "SFT"  # the label of the first row, the common step 0
PLAIN = "PPO"  # the label of a row without overrides


@dataclass(frozen=True)
class Sweep:
    """The runs of one or more sweeps, and the rows of their report.

    Attributes:
        runs: every intended run, whatever its state.
        rows: the SFT row, then one row per configuration of finished runs.
        doubled: finished runs left out because another run of the row has the same seeds.
        layout: the configuration's `report`: title, labels, columns, figures, baseline.
        unlike: finished runs left out because their configuration differs from their row's, with the differences.
        depth: how many leading seeds tell replicates apart (`rlhf.report.rows`).
    """

    runs: tuple[RecordedRun, ...]
    rows: tuple[Row, ...]
    doubled: tuple[RecordedRun, ...]
    layout: Mapping[str, Any]
    unlike: tuple[tuple[RecordedRun, list[str]], ...] = ()
    depth: int = PPO_SEEDS

    @property
    def finished(self) -> list[RecordedRun]:
        """The runs that ended and were evaluated."""
        return [run for run in self.runs if run.state == "finished"]

    @property
    def trained(self) -> tuple[Row, ...]:
        """All rows except the SFT row."""
        return self.rows[1:]

    @cached_property
    def names(self) -> dict[Path, str]:
        """The folder of each run → what it is called: its row and seeds, or its folder where that is not unique."""
        labels, common = self.layout.get("labels") or {}, in_all(dict.fromkeys(run.key for run in self.runs))
        everywhere, called = in_all(run.overrides for run in self.runs), dict[Path, str]()
        for run in self.runs:
            seeds = [item for item in run.overrides if item not in run.key and item not in everywhere]
            known = run.overrides or len(self.runs) == 1
            called[run.folder] = ", ".join([label(run.key, labels, common), *seeds]) if known else run.name
        many = Counter(called.values())
        return {folder: name if many[name] == 1 else folder.name for folder, name in called.items()}

    @property
    def unit(self) -> str:
        """What the statistics count: pipelines, reward models or seeds."""
        return REPLICATES[self.depth]


def load(folders: Sequence[Path], evaluation: str | None = None) -> Sweep:
    """Read one or more sweeps as one. The layout is that of the newest finished run.

    `evaluation` is the digest of the evaluation to show, or `training`; by default, it is the one that a command asked
    for last (`rlhf.report.evaluation_shown`).

    Raises:
        NoRunsError: a folder has no finished run.
    """
    # 1. All runs.
    runs: list[RecordedRun] = []
    for folder in folders:
        found = _load_folder(folder, evaluation)
        if not any(run.state == "finished" for run in found):
            measured = f" with the evaluation {evaluation}" if evaluation else ""
            raise NoRunsError(f"{folder} holds no finished run{measured} (a run leaves summary.json when it ends)")
        runs += found
    finished = [run for run in runs if run.state == "finished"]
    newest = max(finished, key=lambda run: (run.folder / SUMMARY).stat().st_mtime)
    layout = newest.config.get("report") or {}
    # 2. Group the finished ones by their overrides without the seeds.
    keyed: dict[tuple[str, ...], list[RecordedRun]] = {}
    for run in finished:
        keyed.setdefault(run.key, []).append(run)
    # 3. For each group, the runs of one configuration, one per set of seeds.
    kept = dict[tuple[str, ...], list[RecordedRun]]()
    doubled, unlike = list[RecordedRun](), list[tuple[RecordedRun, list[str]]]()
    for key, found in keyed.items():
        alike, others = split_by_config(found)
        unlike += others
        by_seeds: dict[Seeds, RecordedRun] = {}
        for run in alike:
            if by_seeds.setdefault(run.seeds, run) is not run:
                doubled.append(run)
        kept[key] = [run for _, run in sorted(by_seeds.items())]
    # 4. A row of each, and the row of the models that they start from.
    counted = [run for alike in kept.values() for run in alike]
    labels, depth, common = layout.get("labels") or {}, depth_of(counted), in_all(kept)
    trained = [Row(label(key, labels, common), tuple(alike), depth=depth) for key, alike in kept.items()]
    rows = (_sft_row(counted, depth), *trained)
    return Sweep(tuple(runs), rows, tuple(doubled), layout, tuple(unlike), depth)


def _sft_row(runs: Sequence[RecordedRun], depth: int) -> Row:
    """The row of step 0: one run for each set of seeds above PPO's, as those above decide models and learned reward."""
    starts = {run.seeds[: PPO_SEEDS - 1]: run for run in reversed(runs)}
    return Row(SFT, tuple(run for _, run in sorted(starts.items())), step=0, depth=depth)


def label(key: Sequence[str], labels: Mapping[str, str], common: Collection[str] = ()) -> str:
    """A row's label. The layout's `labels` may replace the whole key, an override, or the value of an override.

    Args:
        key: the overrides that the runs of the row share.
        labels: what to replace → by what.
        common: the overrides that all rows share, which distinguish none.
    """
    own = [item for item in key if item not in common]
    for whole in (", ".join(key) or PLAIN, ", ".join(own) or PLAIN):
        if whole in labels:
            return str(labels[whole])
    parts = [labels.get(item, labels.get(item.partition("=")[2], item)) for item in own]
    return ", ".join(map(str, parts)) or PLAIN


def _load_folder(folder: Path, evaluation: str | None) -> list[RecordedRun]:
    """The runs of a sweep in the order of its plan, with those not begun; or the single run that the folder is."""
    plan, fault = try_plan(folder / PLAN)
    if fault:
        log.warning("%s: %s", folder, fault)
    planned = {entry["folder"]: tuple(entry["overrides"]) for entry in plan}
    is_run = (folder / SUMMARY).exists()
    present = [folder] if is_run else sorted(path for path in folder.glob("*/") if _is_run(path))
    names = {path.name for path in present}
    runs = [_load_run(path, planned.get(path.name, ()), evaluation) for path in present]
    runs += [
        RecordedRun(folder / name, overrides, "missing", "not begun")
        for name, overrides in planned.items()
        if name not in names
    ]
    order = {name: position for position, name in enumerate(planned)}
    return sorted(runs, key=lambda run: order.get(run.name, len(order)))


def _load_run(folder: Path, planned: tuple[str, ...], evaluation: str | None = None) -> RecordedRun:
    """A run and its state; `planned` are its overrides by the sweep's plan, in case it left none itself."""
    summary, fault = try_summary(folder / SUMMARY)
    failed, damaged = try_object(folder / FAILED)
    overrides = tuple(summary.get("overrides") or renamed_overrides(failed.get("overrides") or planned))
    if summary:
        summary, measured, missing = with_evaluation(folder, summary, evaluation)
        if missing:
            return RecordedRun(folder, overrides, "unfinished", missing, summary)
        if any(key.startswith("eval/") for key in summary.get("metrics") or {}):
            return RecordedRun(folder, overrides, "finished", summary=summary, measured=measured)
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
