"""Train a policy from wherever it was left to its end, with the evaluations that are due."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from rlhf.distributed import collectives
from rlhf.errors import ConfigError
from rlhf.guards import Guards
from rlhf.pipeline.builders import MakeTrainer
from rlhf.pipeline.checkpoints import Best, StepCheckpoints
from rlhf.pipeline.interruption import Interruption
from rlhf.pipeline.plateau import Plateau, StopAtPlateau
from rlhf.pipeline.train_supervised import keep_metrics
from rlhf.stages.evaluation import PolicyEvaluation
from rlhf.tracking.metrics_file import evaluated_at

log = logging.getLogger(__name__)


def train_policy(
    make_trainer: MakeTrainer,
    stage: PolicyEvaluation,
    rows: Sequence[Any],
    evaluation: DataLoader,
    folder: Path,
    resume: str,
    best: Best | None = None,
    keeping: Sequence[Callback] = (),
) -> dict[str, float]:
    """Train from the SFT model, or from the last checkpoint in `folder`, to the end.

    `rows` are what the stage's `loader` takes, and `keeping` callbacks that keep more than the checkpoints.

    Returns the evaluation of step 0, that of the SFT model.

    Raises:
        ConfigError: `resume` is `must`, and there is no checkpoint.
    """
    settings = stage.settings
    # 1. Where the training was left.
    checkpoints = StepCheckpoints(folder / "checkpoints", settings.checkpoint_every, 2, best, settings.evaluates)
    plateau = Plateau.of(settings, best)
    last = collectives.on_rank_zero(checkpoints.latest)
    if last is None and resume == "must":
        raise ConfigError(f"resume=must, but {checkpoints.folder} holds no checkpoint; allowed: resume=auto")
    start = checkpoints.step_of(last) if last else 0
    trainer = make_trainer(
        folder,
        callbacks=[checkpoints, *keeping, Interruption(checkpoints), *([StopAtPlateau(plateau)] if plateau else [])],
        max_epochs=1,
        val_check_interval=settings.eval_interval,
        check_val_every_n_epoch=None,
    )
    # 2. What is still to be measured, before the weights of the checkpoint are loaded.
    if last and not collectives.on_rank_zero(lambda: evaluated_at(folder, 0)):
        guards, stage.guards = stage.guards, Guards()  # they replay the line
        trainer.validate(stage, evaluation, verbose=False)
        stage.guards = guards
    if _catch_up(trainer, stage, folder, last, start):
        trainer.validate(stage, evaluation, verbose=False)
    # 3. Train; Lightning asks for an evaluation at every interval, and the stage knows whether one is due.
    if start < settings.steps and not _ended(plateau):
        trainer.fit(stage, stage.loader(rows, start), evaluation, ckpt_path=last, weights_only=True)
        if settings.steps % settings.eval_interval and not _ended(plateau):
            trainer.validate(stage, evaluation, verbose=False)
    # 4. Only now is it known which checkpoint is the best.
    collectives.on_rank_zero(checkpoints.prune)
    return collectives.on_rank_zero(lambda: evaluated_at(folder, 0))


def measure_untrained(
    trainer: lightning.Trainer, stage: PolicyEvaluation, evaluation: DataLoader, folder: Path
) -> dict[str, float]:
    """Measure the SFT model alone (stage=evaluate), without what an interrupted process has written of it."""
    keep_metrics(trainer, folder, -1, evaluated=False)
    trainer.validate(stage, evaluation, verbose=False)
    return dict(stage.last_evaluation)


def _ended(plateau: Plateau | None) -> bool:
    """Whether the training is over before its last step."""
    return plateau is not None and collectives.on_rank_zero(plateau.step) is not None


def _catch_up(trainer: lightning.Trainer, stage: PolicyEvaluation, folder: Path, last: Path | None, start: int) -> bool:
    """Bring stage, loggers and guards to where the run was left; returns whether an evaluation is due there."""
    settings = stage.settings
    stage.steps_done = start
    evaluated = collectives.on_rank_zero(lambda: evaluated_at(folder, start))
    due = not evaluated and settings.evaluates(start)
    # without a checkpoint, even step 0 is measured again
    kept = keep_metrics(trainer, folder, start if last else -1, bool(evaluated))
    if last is None:
        return True
    log.info("continuing from step %d", start)
    stage.last_evaluation = evaluated
    stage.guards.replay(kept)
    stage.guards.check()
    if due or start == settings.steps or evaluated:  # otherwise Lightning loads the weights when it trains
        stage.load_trained(last)
    return due
