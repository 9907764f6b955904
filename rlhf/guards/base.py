"""The interface of a guard's detector."""

from collections.abc import Mapping
from dataclasses import dataclass

from rlhf.policy_settings import OptimizerSettings, PolicySettings
from rlhf.settings import GuardSettings, Settings

SKIPPED = "guard/skipped_updates"  # metric of a step: the number of optimiser steps that were skipped
Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Remedies:
    """What the advice of guards names: keys of the stage that they watch.

    Attributes:
        group: The config group of the stage, such as `ppo`.
        lr: The key of the learning rate that it trains at.
        nearer: What would hold the policy nearer to the SFT model; "" where no policy is trained.
    """

    group: str = "ppo"
    lr: str = "ppo.lr"
    nearer: str = "a larger kl.coef"

    @classmethod
    def of(cls, settings: Settings, own: OptimizerSettings) -> "Remedies":
        """Those of a stage whose `own` settings are among these."""
        if not isinstance(own, PolicySettings):
            return cls(own.group, f"{own.group}.lr", "")
        rate = "lr" if settings.lora.r else "lr_full"
        return cls(own.group, f"{own.group}.{rate}", own.nearer(settings.divergence.input != "none"))


class Detector:
    """Recognises one kind of failure from the logged metrics of a run.

    A detector is a fold over the logged lines: its state depends on nothing but the lines it has seen, so replaying
    the lines of `metrics.jsonl` restores it. `window` is how many values, steps or evaluations it looks at. `advice`
    names the usual cause and what to try, in which `{group}`, `{lr}` and `{nearer}` stand for `Remedies`.
    """

    advice: str

    def __init__(self, options: GuardSettings):
        self.window = options.window

    def update(self, step: int, metrics: Metrics) -> str | None:
        """Take in one logged line; return what is wrong, in words, or None."""
        raise NotImplementedError

    @property
    def must_stop(self) -> bool:
        """Whether the run must stop even if the guard's action is `warn`."""
        return False
