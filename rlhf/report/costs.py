"""What more replicates or instructions would cost, in PPO runs, by the times that the runs recorded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf.files import SUMMARY
from rlhf.report.recorded_run import RecordedRun
from rlhf.tracking.reading import try_summary

SAME = ("sft", "model", "data")  # the groups of the configuration that an SFT model is recognised by


class UpstreamCosts(NamedTuple):
    """How long it takes to build one model of each stage above PPO, in PPO runs; 0 if it is not known or not needed."""

    sft: float
    preferences: float
    reward: float


def evaluation_cost(runs: Sequence[RecordedRun]) -> float:
    """The share of a run's time that its evaluations take; 0 if no run recorded it."""
    found = []
    for run in runs:
        evaluating = sum(float(values.get("time/evaluate") or 0) for values in run.evaluations.values())
        if evaluating and _seconds(run.summary):
            found.append(evaluating / _seconds(run.summary))
    return float(np.median(found)) if found else 0.0


def upstream_costs(runs: Sequence[RecordedRun]) -> UpstreamCosts:
    """The costs of the models that runs start from, by what the cache of the runs says: the median over runs."""
    read: dict[Path, Mapping[str, Any]] = {}

    def summary(path: Path) -> Mapping[str, Any]:
        if path not in read:
            read[path] = try_summary(path / SUMMARY)[0]
        return read[path]

    found = []
    for run in runs:
        cache, own = run.folder.parent.parent / "cache", _seconds(run.summary)
        reward = summary(cache / str(run.summary["reward_model"])) if run.summary.get("reward_model") else {}
        preferences = summary(cache / str(reward["preferences"])) if reward.get("preferences") else {}
        built = (summary(path) for path in sorted(cache.glob("sft-*")))
        sft: Mapping[str, Any] = next((each for each in built if _is_start(each, run)), {})
        # an ensemble has members beside its first reward model, and an average is made of some
        members = [*run.summary.get("reward_members", []), *reward.get("members", [])]
        rewards = sum(_seconds(summary(cache / str(name))) for name in members) + _seconds(reward)
        found += [[cost / own for cost in (_seconds(sft), _seconds(preferences), rewards)]] if own else []
    known = [[cost for cost in costs if cost] for costs in zip(*found, strict=True)] or [[], [], []]
    return UpstreamCosts(*(float(np.median(costs)) if costs else 0.0 for costs in known))


def _is_start(summary: Mapping[str, Any], run: RecordedRun) -> bool:
    """Whether an SFT model was built with the configuration of a run."""
    built = summary.get("config") or {}
    return bool(summary) and all(built.get(key) == run.config.get(key) for key in SAME)


def _seconds(summary: Mapping[str, Any]) -> float:
    """The wall-clock time in a summary; 0 if there is none."""
    return float(summary.get("wall_seconds") or 0)
