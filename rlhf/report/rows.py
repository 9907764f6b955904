"""A row of the report: all runs of one configuration, grouped into replicates.

A *replicate* is what the statistics count. Runs that share an SFT model share its luck, so they are not independent:
they count as one replicate, by their mean, as soon as the report has several SFT models. If all runs share one SFT
model, replicates are its reward models; and if they share that, too, the seeds of PPO.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.report.recorded_run import RecordedRun, Steps
from rlhf.report.statistics import Array
from rlhf.tracking.seeds import Seeds

Key = tuple[int, ...]  # the leading seeds that the runs of a replicate share
PPO_SEEDS = len(Seeds._fields)  # the depth at which replicates are PPO's seeds
# what replicates are, by depth: how many of the leading seeds tell them apart
REPLICATES = {1: "pipelines", 2: "reward models", 3: "reward models", PPO_SEEDS: "seeds"}
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


def depth_of(runs: Iterable[RecordedRun]) -> int:
    """How many leading seeds tell replicates apart: up to that of the first stage that varies among these runs."""
    stages = zip(*(run.seeds for run in runs), strict=True)
    return next((depth for depth, seeds in enumerate(stages, start=1) if len(set(seeds)) > 1), PPO_SEEDS)


@dataclass(frozen=True)
class Row:
    """The runs of one configuration at their last step, or with `step=0` the SFT models that they start from.

    Attributes:
        label: its name in tables and figures.
        runs: one per set of seeds.
        step: 0 for the SFT row; None for the last step of each run.
        depth: how many leading seeds tell replicates apart (`depth_of`).
    """

    label: str
    runs: tuple[RecordedRun, ...]
    step: int | None = None
    depth: int = PPO_SEEDS

    def is_called(self, name: str) -> bool:
        """Whether `name` in a layout is this row: its label, its overrides, one of them, or the value of one."""
        key = () if self.step == 0 else self.runs[0].key
        return name in (self.label, ", ".join(key)) or any(name in (item, item.partition("=")[2]) for item in key)

    @property
    def replicates(self) -> dict[Key, list[RecordedRun]]:
        """The runs by replicate. An SFT row has none if only PPO's seed varies: its model is the same everywhere."""
        if self.step == 0 and self.depth == PPO_SEEDS:
            return {}
        return self._groups

    @property
    def single(self) -> bool:
        """Whether it is trained and has a single replicate, so that its spread over replicates is unknown."""
        return self.step is None and len(self.replicates) == 1

    @property
    def _groups(self) -> dict[Key, list[RecordedRun]]:
        groups: dict[Key, list[RecordedRun]] = {}
        for run in self.runs:
            groups.setdefault(run.seeds[: self.depth], []).append(run)
        return groups

    def values(self, metric: str) -> list[float]:
        """The value of a metric for each replicate that has it: the mean over its runs."""
        by_replicate = [[self.value_of(run, metric) for run in runs] for runs in self._groups.values()]
        known = [[value for value in values if value is not None] for values in by_replicate]
        return [float(np.mean(values)) for values in known if values]

    def outcomes(self, metric: str, only: Collection[Key] | None = None) -> Array | None:
        """[replicates, prompts] whose mean is the metric, with NaN for prompts that were not judged in all their runs.

        None unless every run has the metric for the same number of prompts. `only` selects replicates, in its order.
        """
        chosen = self._groups if only is None else {key: self._groups[key] for key in only}
        found = [[self.outcome_of(run, metric) for run in runs] for runs in chosen.values()]
        lengths = {None if values is None else len(values) for replicate in found for values in replicate}
        if len(lengths) != 1 or None in lengths:
            return None
        return np.stack([np.mean(np.stack(replicate), axis=0) for replicate in found])  # type: ignore[arg-type]

    def value_of(self, run: RecordedRun, metric: str) -> float | None:
        """The metric of a single run, final or at step 0; None if it has none."""
        value = (run.summary.get("sft_metrics" if self.step == 0 else "metrics") or {}).get(metric)
        return None if value is None else float(value)

    def outcome_of(self, run: RecordedRun, metric: str) -> Array | None:
        """[prompts] whose mean is the metric of a single run; None if it has none, or others than the metric is of."""
        found, value = per_prompt(_at(run.outcomes, self.step), metric), self.value_of(run, metric)
        return found if found is not None and value is not None and _is_mean(value, found) else None


def per_prompt(outcome: Mapping[str, Any], metric: str) -> Array | None:
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


def _is_mean(value: float, found: Array) -> bool:
    """Whether a metric is the mean of these results, of which those that were not judged are NaN; one that diverged is.

    It is not where the line of the last evaluation is lost, or where a file is another run's.
    """
    judged = found[np.isfinite(found)]
    return not np.isfinite(value) or bool(len(judged) and np.isclose(value, judged.mean(), rtol=1e-4, atol=1e-6))


def _at(outcomes: Steps, step: int | None) -> dict[str, Any]:
    """The outcomes at a step, or at the last one (None); {} if there are none."""
    return outcomes.get(max(outcomes) if step is None and outcomes else step or 0, {})
