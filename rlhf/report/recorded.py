"""One run as it was recorded: its summary, its metrics by step, its evaluations, its samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf.files import METRICS
from rlhf.tracking.reading import numbers_only, renamed_metrics, stepped_lines

Steps = dict[int, dict[str, Any]]


@dataclass(frozen=True)
class RecordedRun:
    """One run: `state` is finished, failed, unfinished or missing, and `reason` says why it is not finished."""

    folder: Path
    overrides: tuple[str, ...]
    state: str
    reason: str = ""
    summary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        return self.summary.get("config") or {}

    @property
    def seed(self) -> int:
        """The seed of PPO."""
        seed = self.config.get("seed", 0)
        return seed if isinstance(seed, int) else 0

    @property
    def key(self) -> tuple[str, ...]:
        """What it shares with the other runs of its row."""
        return tuple(item for item in self.overrides if not item.startswith("seed="))

    @cached_property
    def metrics(self) -> Steps:
        """Everything logged, by step."""
        return {step: renamed_metrics(values) for step, values in merge(self._lines(METRICS)).items()}

    @cached_property
    def evaluations(self) -> Steps:
        """The logged steps at which the policy was evaluated."""
        evaluated = [step for step, values in self.metrics.items() if any(key.startswith("eval/") for key in values)]
        return {step: self.metrics[step] for step in sorted(evaluated)}

    @cached_property
    def outcomes(self) -> Steps:
        """Evaluation results by step, a list over the instructions each."""
        return merge([numbers_only(line) for line in self._lines("outcomes.jsonl")])

    @cached_property
    def samples(self) -> dict[str, dict[int, dict[str, Any]]]:
        """Prompt → step → the sampled response and what it was given."""
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for line in self._lines("samples.jsonl"):
            if isinstance(line.get("prompt"), str) and line["step"] is not None:
                found.setdefault(line["prompt"], {})[line["step"]] = line
        return found

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        if not path.exists() and self.summary.get("same_as"):
            path = self.folder / self.summary["same_as"] / name
        return stepped_lines(path)


def merge(lines: Sequence[Mapping[str, Any]]) -> Steps:
    """By step; of a step written twice (a resumed run) the last value of each key."""
    steps: Steps = {}
    for line in lines:
        if line.get("step") is not None:
            steps.setdefault(int(line["step"]), {}).update(line)
    return steps
