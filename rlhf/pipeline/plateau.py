"""End the training of a policy early, once evaluations no longer improve (`patience`)."""

import logging
from dataclasses import dataclass
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from rlhf.distributed import collectives
from rlhf.pipeline.checkpoints import Best
from rlhf.policy_settings import PolicySettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plateau:
    """Ends a run at the evaluation that is the `patience`-th in a row without a gain of more than `min_gain`.

    A gain is over the evaluation of the last gain, so that a slow rise adds up; the first one is that of step 0. Like
    `Best`, the rule reads `metrics.jsonl`, which a resumed run continues exactly, so that it ends at the same step
    however often it was interrupted.
    """

    best: Best
    patience: int
    min_gain: float

    @classmethod
    def of(cls, settings: PolicySettings, best: Best | None) -> "Plateau | None":
        """The rule that the settings describe; None if there is none."""
        return cls(best, settings.patience, settings.min_gain) if settings.patience and best else None

    def step(self) -> int | None:
        """The step at which the rule ends the run; None if it has not so far."""
        highest, waited = float("-inf"), 0
        for step, value in self.best.evaluations():
            highest, waited = (value, 0) if value > highest + self.min_gain else (highest, waited + 1)
            if waited == self.patience:
                return step
        return None

    def describe(self) -> dict[str, Any] | None:
        """For the summary: where the run ended, and why; None if it ran to its end."""
        step = self.step()
        if step is None:
            return None
        times = "1 evaluation" if self.patience == 1 else f"{self.patience} evaluations in a row"
        return {"step": step, "reason": f"{self.best.metric} has not improved for {times}"}


class StopAtPlateau(Callback):
    """Ends the training after the evaluation at which a plateau is reached; all processes end together."""

    def __init__(self, plateau: Plateau):
        self.plateau = plateau

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        """Tell the trainer, unless it only validates."""
        trainer.should_stop = collectives.on_rank_zero(self.plateau.step) is not None
