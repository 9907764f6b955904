"""Checkpoints at PPO-step boundaries: written aside, synced, renamed; the last few are kept."""

import os
import re
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from rlhf.stages.ppo import PPO


class StepCheckpoints(Callback):
    """Saves `step-000020.ckpt` every `every` PPO steps and at the end, keeps the newest `keep`.

    A checkpoint holds what trains, the optimiser, the schedule and the counters. Random states are not needed: all
    randomness is a function of (seed, purpose, step).
    """

    def __init__(self, folder: Path, every: int, keep: int = 2):
        self.folder, self.every, self.keep = folder, every, keep

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *args: Any) -> None:
        """Save at a step boundary."""
        assert isinstance(module, PPO)
        if module.ppo_step % self.every == 0 or module.ppo_step == module.total_steps:
            self.save(trainer, module.ppo_step)

    def save(self, trainer: lightning.Trainer, step: int) -> None:
        """Write `step`'s checkpoint so that it is there whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / ".writing.ckpt"
        trainer.save_checkpoint(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / f"step-{step:06d}.ckpt")
        for old in self._all()[: -self.keep]:
            old.unlink()

    def latest(self) -> Path | None:
        """The newest checkpoint, if any."""
        return next(reversed(self._all()), None)

    @staticmethod
    def step_of(path: Path) -> int:
        """The PPO step a checkpoint was made after."""
        match = re.fullmatch(r"step-(\d+)\.ckpt", path.name)
        assert match is not None
        return int(match[1])

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.ckpt"))
