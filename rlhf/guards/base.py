"""The interface of a guard's detector."""

from collections.abc import Mapping

from rlhf.settings import GuardSettings

SKIPPED = "guard/skipped_updates"  # metric of a step: the number of optimiser steps that were skipped
Metrics = Mapping[str, float]


class Detector:
    """Recognises one kind of failure from the logged metrics of a run.

    A detector is a fold over the logged lines: its state depends on nothing but the lines it has seen, so replaying
    the lines of `metrics.jsonl` restores it. `window` is how many values, steps or evaluations it looks at. `advice`
    names the usual cause and what to try.
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
