"""Checkpoints at step boundaries: written aside, synced, renamed, with a checksum; the last few are kept."""

import hashlib
import logging
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from rlhf import parallel
from rlhf.files import aside
from rlhf.stages.base import Stage

log = logging.getLogger(__name__)


class StepCheckpoints(Callback):
    """Saves `step-000020.ckpt` every `every` steps and at the end, keeps the newest `keep`.

    A checkpoint holds what trains, the optimiser, the schedule and the counters. Random states are not needed: all
    randomness is a function of (seed, purpose, step).
    """

    def __init__(self, folder: Path, every: int, keep: int = 2):
        self.folder, self.every, self.keep = folder, every, keep

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *args: Any) -> None:
        """Save at a step boundary."""
        assert isinstance(module, Stage)
        if module.steps_done % self.every == 0 or module.steps_done == module.total_steps:
            self.save(trainer, module)

    def save(self, trainer: lightning.Trainer, module: Stage) -> int:
        """Write the checkpoint of the step just done, there whole or not at all; returns the step.

        All processes call it, and the first writes.
        """
        step = module.steps_done
        path = self.folder / f"step-{step:06d}.ckpt"
        if parallel.from_first(path.exists):
            return step
        if not parallel.is_first():
            trainer.save_checkpoint(path)
            return step
        self.folder.mkdir(parents=True, exist_ok=True)
        with aside(path) as temporary:
            trainer.save_checkpoint(temporary)
            # the checksum first: a checkpoint without one never has its final name
            with aside(_checksum_file(path)) as note:
                note.write_text(_checksum(temporary))
        for old in self._all()[: -self.keep]:
            self._remove(old)
        return step

    def latest(self) -> Path | None:
        """The newest sound checkpoint, if any; damaged ones are named and removed, half-written ones just removed."""
        for torn in self.folder.glob(".step-*"):
            torn.unlink()
        for path in reversed(self._all()):
            if _sound(path):
                return path
            log.warning("%s is damaged: using the one before it", path)
            self._remove(path)
        return None

    @classmethod
    def reached(cls, folder: Path) -> int:
        """The step of the newest checkpoint in a folder, sound or not; nothing is read, checked or removed."""
        return max(map(cls.step_of, folder.glob("step-*.ckpt")), default=0)

    @staticmethod
    def step_of(path: Path) -> int:
        """The step a checkpoint was made after."""
        match = re.fullmatch(r"step-(\d+)\.ckpt", path.name)
        assert match is not None
        return int(match[1])

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.ckpt"))

    def _remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        _checksum_file(path).unlink(missing_ok=True)


def _sound(path: Path) -> bool:
    """Whether it is what was written, and nothing but tensors and numbers: a checksum is no proof of who made it."""
    note = _checksum_file(path)
    if not note.exists() or note.read_text() != _checksum(path):
        return False
    try:
        torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except (UnpicklingError, RuntimeError, ValueError):
        return False
    return True


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
