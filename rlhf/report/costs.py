"""What more replicates or instructions would cost, in PPO runs, by the times that the runs recorded."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rlhf.files import SUMMARY
from rlhf.report.recorded_run import RecordedRun
from rlhf.tracking.reading import try_summary

SAME = ("sft", "model", "data")  # the groups of the configuration that an SFT model is recognised by


def evaluation_cost(runs: Sequence[RecordedRun]) -> float:
    """The share of a run's time that its evaluations take; 0 if no run recorded it."""
    found = []
    for run in runs:
        evaluating = sum(float(values.get("time/evaluate") or 0) for values in run.evaluations.values())
        if evaluating and _seconds(run.summary):
            found.append(evaluating / _seconds(run.summary))
    return float(np.median(found)) if found else 0.0


def upstream_cost(runs: Sequence[RecordedRun]) -> float:
    """How long it takes to build an SFT model and a reward model, in PPO runs; 0 if the cache of the runs is gone."""
    found: dict[str, float] = {}
    for run in runs:
        cache, name = run.folder.parent.parent / "cache", run.summary.get("reward_model")
        seconds = _seconds(try_summary(cache / str(name) / SUMMARY)[0])
        if seconds and _seconds(run.summary) and name not in found:
            found[str(name)] = (seconds + _sft_seconds(cache, run)) / _seconds(run.summary)
    return float(np.median(list(found.values()))) if found else 0.0


def _sft_seconds(cache: Path, run: RecordedRun) -> float:
    """The time that the SFT model of a run took, by the configuration it was built with; 0 if it is not found."""
    for path in sorted(cache.glob(f"sft-*/{SUMMARY}")):
        summary = try_summary(path)[0]
        built = summary.get("config") or {}
        if all(built.get(key) == run.config.get(key) for key in SAME):
            return _seconds(summary)
    return 0.0


def _seconds(summary: object) -> float:
    """The wall-clock time in a summary; 0 if there is none."""
    return float(summary.get("wall_seconds") or 0) if isinstance(summary, dict) else 0.0
