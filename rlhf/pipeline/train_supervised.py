"""Train a supervised stage from wherever it was left to its end, and measure it before and after."""

import logging
from pathlib import Path
from typing import Any

import lightning
from torch.utils.data import DataLoader

from rlhf.distributed import collectives
from rlhf.pipeline.builders import MakeTrainer
from rlhf.pipeline.checkpoints import StepCheckpoints
from rlhf.pipeline.interruption import Interruption
from rlhf.settings import SupervisedSettings
from rlhf.stages.batches import SeededBatches, loader
from rlhf.stages.supervised import SupervisedStage
from rlhf.tracking.continuing import continue_loggers
from rlhf.tracking.metrics_file import forget_after, is_kept, numbers, read_metrics

HELD_OUT = 32  # held-out rows read at a time, at least; they go through the model in micro-batches

log = logging.getLogger(__name__)


def train_supervised(
    make_trainer: MakeTrainer,
    stage: SupervisedStage,
    settings: SupervisedSettings,
    train: list[Any],
    held_out: list[Any],
    folder: Path,
) -> dict[str, float]:
    """Train on encoded rows from the first step, or from the last checkpoint in `folder`, to the end.

    Returns the latest value of every metric, and as `<metric>_before` those measured before training.
    """
    # 1. Where the training was left.
    checkpoints = StepCheckpoints(folder / "checkpoints", settings.checkpoint_every)
    last = collectives.on_rank_zero(checkpoints.latest)
    start = checkpoints.step_of(last) if last else 0
    stage.resumed_at = start
    trainer = make_trainer(folder, max_epochs=1, callbacks=[checkpoints, Interruption(checkpoints)])
    validation = DataLoader(held_out, batch_size=max(settings.batch_size, HELD_OUT), collate_fn=stage.collate)  # type: ignore[arg-type, var-annotated]
    # without a checkpoint, even step 0 is measured again
    kept = keep_metrics(trainer, folder, start if last else -1, evaluated=False)
    # 2. Measure the untrained model, or catch up with what was logged.
    if last is None:
        trainer.validate(stage, validation, verbose=False)
    else:
        log.info("continuing from step %d", start)
        stage.guards.replay(kept)
        stage.guards.check()
    # 3. Train.
    if start < stage.total_steps:
        share = slice(collectives.rank(), None, collectives.size())
        batches = SeededBatches(len(train), settings.batch_size, settings.seed, stage.total_steps, start, share)
        trainer.fit(stage, loader(train, stage.collate, batches), ckpt_path=last, weights_only=True)
    elif last:
        stage.load_trained(last)
    # 4. Measure the trained model.
    stage.roles.eval()
    trainer.validate(stage, validation, verbose=False)
    lines = [numbers(line) for line in collectives.on_rank_zero(lambda: read_metrics(folder))]
    latest = {key: value for line in lines for key, value in line.items()}
    return {**latest, **{f"{key}_before": value for key, value in lines[0].items()}}


def keep_metrics(trainer: lightning.Trainer, folder: Path, step: int, evaluated: bool) -> list[dict[str, Any]]:
    """Drop the metrics that a run resumed at `step` will log again, and return the lines that remain.

    The loggers are brought to the same place. `evaluated` says that the evaluation at `step` is complete and stays.
    """
    return collectives.on_rank_zero(lambda: _keep_metrics(trainer, folder, step, evaluated))


def _keep_metrics(trainer: lightning.Trainer, folder: Path, step: int, evaluated: bool) -> list[dict[str, Any]]:
    forgotten = [line["step"] for line in read_metrics(folder) if not is_kept(line, step, evaluated)]
    forget_after(folder, step, evaluated)
    kept = read_metrics(folder)
    continue_loggers(trainer.loggers, kept, min(forgotten, default=None))
    return kept
