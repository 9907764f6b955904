"""`metrics.jsonl`: a line per logged step, and what a resumed run keeps of it."""

import json
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from rlhf.errors.machine import writing
from rlhf.files import LINE_FILES, METRICS, keep_lines, read_lines

WANDB_UNSENT_SECONDS = 60


# what lines of an evaluation have: those of PPO's three files, of SFT and of the reward model
EVALUATED = ("time/evaluate", "response", "tokens", "sft/validation_loss", "reward/validation_loss")


class JsonLines(Logger):
    """`metrics.jsonl`: a JSON object per logged step, with `step` and wall-clock `time` (seconds since 1970)."""

    def __init__(self, folder: Path):
        super().__init__()
        self.path = folder / METRICS

    @property
    def name(self) -> str:
        """Lightning asks for one."""
        return "jsonl"

    @property
    def version(self) -> str:
        """Lightning asks for one."""
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The configuration stands in summary.json and .hydra already."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`."""
    return read_lines(folder / METRICS, "step")


def forget_after(folder: Path, step: int, evaluated: bool) -> None:
    """Drop from a run's line files what a resumed run will write again: all after `step`, and half a last line.

    `evaluated` says that the evaluation at `step` is complete and stays.
    """
    for name in LINE_FILES:
        if (folder / name).exists():
            keep_lines(folder / name, lambda line: _stays(line, step, evaluated), "step")


def _stays(line: dict[str, Any], step: int, evaluated: bool) -> bool:
    is_evaluation = any(key in line for key in EVALUATED)
    return line["step"] < step or (line["step"] == step and (evaluated or not is_evaluation))


def evaluated_at(folder: Path, step: int) -> dict[str, float]:
    """The metrics of the evaluation at `step`, {} if it was not finished."""
    found = [line for line in read_metrics(folder) if line["step"] == step and "time/evaluate" in line]
    return numbers(found[-1]) if found else {}


def maybe_unsent(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the lines that a resumed run keeps, those of its last minute: W&B, killed, loses what it had not written yet.

    It writes every 15 seconds. A line that is sent twice is one point of a curve.
    """
    return [line for line in lines if line.get("time", 0) > lines[-1].get("time", 0) - WANDB_UNSENT_SECONDS] or [
        *lines[-1:]
    ]


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a line of `metrics.jsonl`."""
    return {k: v for k, v in line.items() if k not in ("step", "time") and not k.startswith("guard/")}
