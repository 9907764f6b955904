"""Stopping on SIGTERM, SIGINT or SIGUSR1: finish the step, save, and exit with 75 ("try again later")."""

import logging
import signal
import threading
from types import FrameType
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from rlhf.distributed import collectives, processes
from rlhf.errors import Interrupted
from rlhf.pipeline.checkpoints import StepCheckpoints

log = logging.getLogger(__name__)


class Interruption(Callback):
    """Notes a signal and acts on it at the next step boundary; a second SIGINT stops at once.

    The handler itself saves nothing, because a signal may arrive in the middle of an update.
    """

    def __init__(self, checkpoints: StepCheckpoints):
        self.checkpoints = checkpoints
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Remember the signal handlers before Lightning replaces them."""
        self._before = {number: signal.getsignal(number) for number in processes.SIGNALS}

    def on_train_start(self, *args: Any) -> None:
        """Replace Lightning's handlers, which stop without saving, or not at all during validation."""
        self._take_over()

    def on_validation_start(self, *args: Any) -> None:
        """Replace the handlers for a validation outside of training as well."""
        self._take_over()

    def _take_over(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in processes.SIGNALS:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        log.warning("%s: finishing the step, then saving and leaving", self.received.name)

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *args: Any) -> None:
        """Save and stop if a signal has arrived."""
        self._leave(trainer, module)

    def on_validation_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Stop mid-evaluation, once every process has handled a batch; resuming repeats the evaluation."""
        if (batch_idx + 1) % collectives.size() == 0:
            self._leave(trainer, module)

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        """Stop after the answers were judged, which may have taken long."""
        self._leave(trainer, module)

    def on_exception(self, trainer: lightning.Trainer, module: Any, exception: BaseException) -> None:
        """Save when an outside service fails between two steps, such as a judge's endpoint."""
        if isinstance(exception, Interrupted) and trainer.state.fn == TrainerFn.FITTING:
            self.checkpoints.save(trainer, module)
        self.teardown()  # Lightning calls it only if there was no exception

    def _leave(self, trainer: lightning.Trainer, module: Any) -> None:
        if processes.launcher_died():
            self.received = self.received or signal.SIGTERM
        received = max(collectives.all_gather(int(self.received or 0)))  # all processes leave together
        if not received:
            return
        if trainer.state.fn == TrainerFn.FITTING:  # outside of training there is nothing new to save
            self.checkpoints.save(trainer, module)
        name = signal.Signals(received).name
        raise Interrupted(f"stopped by {name} after step {module.steps_done}; the same command continues")

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Restore the earlier handlers, however training ended."""
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)
