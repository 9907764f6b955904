"""One run as its files record it: summary, metrics by step, evaluation results per instruction, samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf.files import METRICS, OUTCOMES, SAMPLES
from rlhf.tracking.reading import numbers_only, renamed_metrics, stepped_lines
from rlhf.tracking.seeds import Seeds, seeds_of, without_seeds

Steps = dict[int, dict[str, Any]]  # step → what was written at that step


@dataclass(frozen=True)
class RecordedRun:
    """A run's folder and what it holds.

    `state` is finished, failed, unfinished or missing; `reason` says why it is not finished. `summary` is empty unless
    the run left one. The larger files are read on first use. `measured` is the folder of the evaluation that is shown
    (`rlhf.tracking.evaluations`) if that is not the one made during the training.
    """

    folder: Path
    overrides: tuple[str, ...]
    state: str
    reason: str = ""
    summary: Mapping[str, Any] = field(default_factory=dict)
    measured: Path | None = None

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.folder.name

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration; {} for runs that recorded none."""
        return self.summary.get("config") or {}

    @cached_property
    def seeds(self) -> Seeds:
        """The seeds of its pipeline."""
        return seeds_of(self.config)

    @property
    def key(self) -> tuple[str, ...]:
        """The overrides that all runs of a row share: all but the seeds."""
        return without_seeds(self.overrides)

    @cached_property
    def metrics(self) -> Steps:
        """Step → all metrics logged at that step, under their present names."""
        lines = self._lines(METRICS)
        if self.measured:
            lines = [line for line in lines if "time/evaluate" not in line] + stepped_lines(self.measured / METRICS)
        return {step: renamed_metrics(values) for step, values in merge(lines).items()}

    @cached_property
    def evaluations(self) -> Steps:
        """The entries of `metrics` for the steps at which the policy was evaluated, in order."""
        evaluated = [step for step, values in self.metrics.items() if any(key.startswith("eval/") for key in values)]
        return {step: self.metrics[step] for step in sorted(evaluated)}

    @cached_property
    def outcomes(self) -> Steps:
        """Step → key → list with one result per evaluation instruction."""
        return merge([numbers_only(line) for line in self._measured_lines(OUTCOMES)])

    @cached_property
    def samples(self) -> dict[str, dict[int, dict[str, Any]]]:
        """Prompt → step → line of `samples.jsonl`: the response, its scores and the reference output."""
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for line in self._measured_lines(SAMPLES):
            if isinstance(line.get("prompt"), str) and line["step"] is not None:
                found.setdefault(line["prompt"], {})[line["step"]] = line
        return found

    def _measured_lines(self, name: str) -> list[dict[str, Any]]:
        """The lines of one of the files of the evaluation that is shown."""
        return stepped_lines(self.measured / name) if self.measured else self._lines(name)

    def _lines(self, name: str) -> list[dict[str, Any]]:
        """The lines of one of the run's files; those of a run taken over may only exist where it was made."""
        path = self.folder / name
        if not path.exists() and self.summary.get("same_as"):
            path = self.folder / self.summary["same_as"] / name
        return stepped_lines(path)


def merge(lines: Sequence[Mapping[str, Any]]) -> Steps:
    """Group lines by step. If a resumed run wrote a step twice, the last value of each key counts."""
    steps: Steps = {}
    for line in lines:
        if line.get("step") is not None:
            steps.setdefault(int(line["step"]), {}).update(line)
    return steps
