"""What a terminal shows while one run trains: a line with the stage, the step and a few metrics, and no line more."""

import logging
import sys
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from rlhf.distributed import collectives
from rlhf.files import PROGRESS, write_json

# What the line says of a stage's metrics, in this order: a short name, and how the number is shown.
SHORT = {
    "sft/loss": ("loss", "{:.3f}"),
    "reward/loss": ("loss", "{:.3f}"),
    "dpo/loss": ("loss", "{:.3f}"),
    "best_of_n/loss": ("loss", "{:.3f}"),
    "sft/perplexity": ("perplexity", "{:.2f}"),
    "reward/accuracy": ("right", "{:.0%}"),
    "ppo/reward": ("reward", "{:.2f}"),
    "eval/win_rate": ("win", "{:.0%}"),
    "eval/true_kl": ("KL", "{:.2f}"),
}
TITLES = {
    "SupervisedFineTuning": "SFT",
    "RewardModeling": "reward model",
    "BestOfN": "best of n",
    "ExpertIteration": "expert iteration",
}


def with_displays(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The options of a trainer that works in `folder`, with the callbacks that say on a terminal how far it is."""
    callbacks = [*options.get("callbacks", ()), Steps(folder), *([Bar()] if options["enable_progress_bar"] else [])]
    return {**options, "callbacks": callbacks}


class Bar(ProgressBar):
    """One line for each training, which stays at its end, and one for each measurement, which does not.

    The log is printed above it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self.progress: Progress | None = None
        self.moved: list[tuple[logging.StreamHandler[Any], Any]] = []

    def disable(self) -> None:
        """Required by Lightning, which shows a bar in the first process only."""
        self.enabled = False

    def enable(self) -> None:
        """Required by Lightning."""
        self.enabled = True

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Show the line of a training."""
        self._open(f"{title_of(pl_module)}", pl_module.total_steps, transient=False)
        self._move(trainer, pl_module)

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *args: Any) -> None:
        """Show the step, and the latest metrics."""
        self._move(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Leave the line as it is."""
        self._move(trainer, pl_module)
        self._close()

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Say that the stage is measured: in the line of its training, or in one of its own."""
        if self.progress is None:
            batches = sum(int(number) for number in trainer.num_val_batches)
            self._open(f"{title_of(pl_module)}, measuring", batches, transient=True)
        else:
            self.progress.update(self.task, description=f"{title_of(pl_module)}, measuring")

    def on_validation_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Count what is measured outside of a training."""
        if self.progress is not None and trainer.state.fn != "fit":
            self.progress.update(self.task, completed=batch_idx + 1)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Go back to the training, or remove the line."""
        if trainer.state.fn == "fit":
            self._move(trainer, pl_module)
        else:
            self._close()

    def on_exception(self, *args: Any) -> None:
        """Leave the line, so that what is said of the error comes below it."""
        self._close()

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """End, however the stage ended."""
        self._close()

    def _open(self, title: str, total: int, transient: bool) -> None:
        console = Console()
        if not self.enabled or not console.is_terminal:
            return
        columns = [
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            TextColumn("{task.completed}/{task.total}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=max(5, min(30, console.width - 65))),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[metrics]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
        ]
        self.progress = Progress(*columns, console=console, transient=transient)
        self.task = self.progress.add_task(title, total=total, metrics="")
        self.progress.start()
        # the log wrote to the stream that is now redirected to the lines above this one
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.__stdout__, sys.__stderr__):
                self.moved.append((handler, handler.setStream(sys.stdout)))

    def _move(self, trainer: lightning.Trainer, stage: Any) -> None:
        if self.progress is not None:
            self.progress.update(
                self.task,
                description=title_of(stage),
                completed=stage.steps_done,
                metrics=short(trainer.progress_bar_metrics),
            )

    def _close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
        for handler, stream in self.moved:
            handler.setStream(stream)
        self.moved.clear()


class Steps(Callback):
    """Says in `progress.json` how many steps a stage has, while it trains: the display of a sweep reads it."""

    def __init__(self, folder: Path):
        self.path = folder / PROGRESS

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Write it."""
        collectives.on_rank_zero(lambda: write_json(self.path, {"steps": pl_module.total_steps}))

    def on_train_end(self, *args: Any) -> None:
        """Remove it."""
        collectives.on_rank_zero(lambda: self.path.unlink(missing_ok=True))


def title_of(stage: Any) -> str:
    """What a stage is called on the terminal."""
    name = type(stage).__name__
    return TITLES.get(name, name)


def short(metrics: dict[str, Any]) -> str:
    """The metrics of a stage in a few words, such as `reward 1.52  win 43%  KL 0.11`."""
    parts = [f"{name} {form.format(float(metrics[key]))}" for key, (name, form) in SHORT.items() if key in metrics]
    return "  ".join(parts)
