"""`metrics.jsonl`: the logger that writes it, its readers, and what a resumed run drops from it."""

import json
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from rlhf.errors.machine import writing
from rlhf.files import LINE_FILES, METRICS, keep_lines, read_lines

NOT_METRICS = ("step", "time")  # what a line says beside its metrics
# Keys that only lines of an evaluation have: in PPO's metrics.jsonl, samples.jsonl and outcomes.jsonl, in SFT's and in
# the reward model's metrics.jsonl.
EVALUATION_KEYS = ("time/evaluate", "response", "tokens", "sft/validation_loss", "reward/validation_loss")


class FileLogger(Logger):
    """A Lightning logger that writes the metrics of a run into the file `path`."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        """Required by Lightning."""
        return self.path.suffix.removeprefix(".")

    @property
    def version(self) -> str:
        """Required by Lightning."""
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the configuration is in summary.json and .hydra already."""


class JsonLines(FileLogger):
    """Appends one JSON object per call to `metrics.jsonl`, with `step` and `time` (seconds since 1970)."""

    def __init__(self, folder: Path):
        super().__init__(folder / METRICS)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a line with the metrics of a step."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; [] if it does not exist."""
    return read_lines(folder / METRICS, "step")


def forget_after(folder: Path, step: int, evaluated: bool) -> None:
    """Drop the lines that a resumed run will write again: all after `step`, and an incomplete last line.

    Args:
        folder: the run, whose metrics, outcomes and samples are affected.
        step: the step from which the run resumes.
        evaluated: whether the evaluation at `step` is complete; if not, its lines are dropped as well.
    """
    for name in LINE_FILES:
        if (folder / name).exists():
            keep_lines(folder / name, lambda line: is_kept(line, step, evaluated), "step")


def is_kept(line: dict[str, Any], step: int, evaluated: bool) -> bool:
    """Whether a resumed run keeps a line, as `forget_after` describes."""
    is_evaluation = any(key in line for key in EVALUATION_KEYS)
    return line["step"] < step or (line["step"] == step and (evaluated or not is_evaluation))


def evaluated_at(folder: Path, step: int) -> dict[str, float]:
    """The metrics of the evaluation at `step`; {} if it was not completed."""
    found = [line for line in read_metrics(folder) if line["step"] == step and "time/evaluate" in line]
    return numbers(found[-1]) if found else {}


def evaluated_steps(folder: Path) -> set[int]:
    """The steps whose evaluation was completed."""
    return {line["step"] for line in read_metrics(folder) if "time/evaluate" in line}


def metrics_of(line: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a line of `metrics.jsonl`, as they were logged."""
    return {key: value for key, value in line.items() if key not in NOT_METRICS}


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a line of `metrics.jsonl` without the values of guards."""
    return {key: value for key, value in metrics_of(line).items() if not key.startswith("guard/")}
