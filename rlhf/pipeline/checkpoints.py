"""Checkpoints at step boundaries: written aside, synced, renamed, with a checksum; the newest and the best are kept."""

import logging
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback

from rlhf.distributed import collectives
from rlhf.files import METRICS, aside, read_lines
from rlhf.files.digests import sha256
from rlhf.stages.base import Stage
from rlhf.tracking import sessions
from rlhf.tracking.summary import environment, peak_memory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Best:
    """Which evaluation of the run in `folder` is the best so far, by a metric whose `mode` is `max` or `min`.

    It is read from `metrics.jsonl`, which a resumed run continues exactly; a record of its own could get out of step.
    """

    folder: Path
    metric: str
    mode: str

    def step(self) -> int | None:
        """The step of the best evaluation; the last of equally good ones, None if there is none.

        Step 0, where nothing is trained yet, and non-finite values are ignored.
        """
        found = [(value, step) for step, value in self.evaluations() if step and math.isfinite(value)]
        return max(found, default=(None, None))[1]

    @property
    def steps(self) -> list[int]:
        """The steps among which the best is chosen: fewer if the judge changed on the way."""
        return [step for step, _ in self.evaluations() if step]

    def evaluations(self) -> list[tuple[int, float]]:
        """Step and value of every evaluation so far, where higher is better; NaN where the metric is missing."""
        lines = [line for line in read_lines(self.folder / METRICS, "step") if "time/evaluate" in line]
        sign = 1 if self.mode == "max" else -1
        return [(line["step"], sign * line.get(self.metric, math.nan)) for line in lines]


class DirectCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint straight to its file.

    Lightning's own way makes two copies in memory, and one in $TMPDIR, which may be on another, small disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write to `path`, through a Python file, whose errors say what is wrong with the disk."""
        with Path(path).open("wb") as file:
            torch.save(checkpoint, file)


class StepCheckpoints(Callback):
    """Saves `step-000020.ckpt` every `every` steps and at the end; keeps the newest `keep`, and the `best` if given.

    With `best`, it also saves the steps that `evaluates` says are evaluated next and may turn out to be the best.

    A checkpoint holds the trained parameters, the optimiser, the schedule and the counters. It needs no random states,
    because everything random is a function of (seed, purpose, step).
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        keep: int = 2,
        best: Best | None = None,
        evaluates: Callable[[int], bool] = lambda step: False,
    ):
        self.folder, self.every, self.keep, self.best, self.evaluates = folder, every, keep, best, evaluates
        self.start, self.started, self.noted = 0, time.monotonic(), False

    def setup(self, trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        """Replace Lightning's way of writing checkpoints; note, once, what computes from here on."""
        trainer.strategy.checkpoint_io = DirectCheckpointIO()
        if not self.noted:
            self.noted, found = True, environment()
            collectives.on_rank_zero(lambda: sessions.begin(self.folder.parent, self.start, found))

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *args: Any) -> None:
        """Save at a step boundary."""
        assert isinstance(module, Stage)
        step = module.steps_done
        if step % self.every == 0 or (self.best and self.evaluates(step)) or step == module.total_steps:
            self.save(trainer, module)

    def save(self, trainer: lightning.Trainer, module: Stage) -> int:
        """Write the checkpoint of the last finished step, atomically; returns the step.

        All processes call it, and the first one writes.
        """
        step = module.steps_done
        path = self._path(step)
        if collectives.on_rank_zero(path.exists):
            return step
        if not collectives.is_rank_zero():
            trainer.save_checkpoint(path)
            return step
        self.folder.mkdir(parents=True, exist_ok=True)
        with aside(path) as temporary:
            trainer.save_checkpoint(temporary)
            # the checksum first, so that a checkpoint under its final name always has one
            with aside(_checksum_file(path)) as note:
                note.write_text(sha256(temporary), encoding="utf-8")
        sessions.extend(self.folder.parent, time.monotonic() - self.started, peak_memory())
        self.prune()
        return step

    def prune(self) -> None:
        """Remove all checkpoints but the newest and the best."""
        for old in set(self._all()[: -self.keep]) - {self._best_path()}:
            self._remove(old)

    def sound_best(self) -> Path | None:
        """The checkpoint of the best evaluation; None if there is none or it is damaged."""
        path = self._best_path()
        if path is None or _sound(path):
            return path
        log.warning("%s, the best, is gone or damaged", path)
        return None

    def _best_path(self) -> Path | None:
        step = self.best.step() if self.best else None
        return None if step is None else self._path(step)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}.ckpt"

    def latest(self) -> Path | None:
        """The newest sound checkpoint, or None. Damaged ones are reported and removed, half-written ones removed."""
        for torn in self.folder.glob(".step-*"):
            torn.unlink()
        for path in reversed(self._all()):
            if _sound(path):
                self.start = self.step_of(path)
                return path
            log.warning("%s is damaged: using the one before it", path)
            self._remove(path)
        return None

    @classmethod
    def reached(cls, folder: Path) -> int:
        """The step of the newest checkpoint in a folder, 0 if there is none; nothing is read, checked or removed."""
        return max(map(cls.step_of, folder.glob("step-*.ckpt")), default=0)

    @staticmethod
    def step_of(path: Path) -> int:
        """The step after which a checkpoint was made."""
        match = re.fullmatch(r"step-(\d+)\.ckpt", path.name)
        assert match is not None
        return int(match[1])

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.ckpt"))

    def _remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        _checksum_file(path).unlink(missing_ok=True)


def _sound(path: Path) -> bool:
    """Whether a checkpoint has its checksum and holds only tensors and plain values.

    The second check is for safety: a checksum does not prove who wrote the file, and unpickling could run code.
    """
    note = _checksum_file(path)
    if not (path.exists() and note.exists()) or note.read_text(encoding="utf-8") != sha256(path):
        return False
    try:
        torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except (UnpicklingError, RuntimeError, ValueError):
        return False
    return True


def _checksum_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
