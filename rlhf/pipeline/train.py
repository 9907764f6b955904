"""From wherever a stage was left to its end: trainer, checkpoints, what was measured and what is still due."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
from torch.utils.data import DataLoader

from rlhf.distributed import collectives
from rlhf.errors import ConfigError
from rlhf.pipeline.checkpoints import Best, StepCheckpoints
from rlhf.pipeline.interruption import Interruption
from rlhf.settings import RewardSettings, SFTSettings
from rlhf.stages.batches import SeededBatches, loader
from rlhf.stages.ppo import PPO
from rlhf.stages.reward import RewardModeling
from rlhf.stages.sft import SupervisedFineTuning
from rlhf.tracking.dashboards import Dashboard, maybe_unsent
from rlhf.tracking.metrics_file import evaluated_at, forget_after, numbers, read_metrics

log = logging.getLogger(__name__)
MakeTrainer = Callable[..., lightning.Trainer]


def train_supervised(
    make_trainer: MakeTrainer,
    stage: SupervisedFineTuning | RewardModeling,
    settings: SFTSettings | RewardSettings,
    train: list[Any],
    held_out: list[Any],
    folder: Path,
) -> dict[str, float]:
    """Train a supervised stage from its first step or its last checkpoint to its end; measured before and after."""
    checkpoints = StepCheckpoints(folder / "checkpoints", settings.checkpoint_every)
    last = collectives.on_rank_zero(checkpoints.latest)
    start = checkpoints.step_of(last) if last else 0
    stage.resumed_at = start
    trainer = make_trainer(folder, max_epochs=1, callbacks=[checkpoints, Interruption(checkpoints)])
    validation = DataLoader(held_out, batch_size=settings.batch_size, collate_fn=stage.collate)  # type: ignore[arg-type, var-annotated]
    kept = collectives.on_rank_zero(lambda: _kept(folder, start if last else -1, evaluated=False))
    if last is None:
        trainer.validate(stage, validation, verbose=False)
    else:
        log.info("continuing from step %d", start)
        _send_again(trainer, kept)
        stage.guards.replay(kept)
        stage.guards.check()
    if start < stage.total_steps:
        share = slice(collectives.rank(), None, collectives.size())
        batches = SeededBatches(len(train), settings.batch_size, settings.seed, stage.total_steps, start, share)
        trainer.fit(stage, loader(train, stage.collate, batches), ckpt_path=last, weights_only=True)
    elif last:
        stage.load_trained(last)
    stage.roles.eval()
    trainer.validate(stage, validation, verbose=False)
    lines = [numbers(line) for line in collectives.on_rank_zero(lambda: read_metrics(folder))]
    latest = {key: value for line in lines for key, value in line.items()}
    return {**latest, **{f"{key}_before": value for key, value in lines[0].items()}}


def _kept(folder: Path, step: int, evaluated: bool) -> list[dict[str, Any]]:
    """Forget what comes after a step; what is left of the metrics."""
    forget_after(folder, step, evaluated)
    return read_metrics(folder)


def _send_again(trainer: lightning.Trainer, kept: list[dict[str, Any]]) -> None:
    """Send to dashboards what may have been lost with the process before; a step's samples and histograms are not."""
    for dashboard in (logger for logger in trainer.loggers if isinstance(logger, Dashboard)):
        for line in maybe_unsent(kept):
            numbers = {key: value for key, value in line.items() if key not in ("step", "time")}
            dashboard.log_metrics(numbers, line["step"])


def train_ppo(
    make_trainer: MakeTrainer,
    stage: PPO,
    prompts: list[str],
    evaluation: DataLoader,
    folder: Path,
    resume: str,
    best: Best | None = None,
) -> dict[str, float]:
    """Train from the SFT model, or the last checkpoint, to the end; returns the evaluation of step 0."""
    settings, ppo = stage.config, stage.ppo
    checkpoints = StepCheckpoints(folder / "checkpoints", ppo.checkpoint_every, best=best, also_every=ppo.eval_every)
    last = collectives.on_rank_zero(checkpoints.latest)
    if last is None and resume == "must":
        raise ConfigError(f"resume=must, but {checkpoints.folder} holds no checkpoint; allowed: resume=auto")
    start = checkpoints.step_of(last) if last else 0
    trainer = make_trainer(
        folder,
        callbacks=[checkpoints, Interruption(checkpoints)],
        max_epochs=1,
        val_check_interval=ppo.eval_every,
        check_val_every_n_epoch=None,
    )
    stage.ppo_step = start
    evaluated = collectives.on_rank_zero(lambda: evaluated_at(folder, start))
    due = not evaluated and (start % ppo.eval_every == 0 or start == ppo.steps)
    metrics = collectives.on_rank_zero(lambda: _kept(folder, start if last else -1, bool(evaluated)))
    if last:
        log.info("continuing from step %d", start)
        stage.last_evaluation = evaluated
        _send_again(trainer, metrics)
        stage.guards.replay(metrics)
        stage.guards.check()
        if due or start == ppo.steps:
            stage.load_trained(last)
    if due or not last:
        trainer.validate(stage, evaluation, verbose=False)
    if start < ppo.steps:
        batches = SeededBatches(len(prompts), ppo.rollout_batch_size, settings.seed, ppo.steps, start)
        trainer.fit(stage, loader(prompts, list, batches), evaluation, ckpt_path=last, weights_only=True)
        if ppo.steps % ppo.eval_every:
            trainer.validate(stage, evaluation, verbose=False)
    collectives.on_rank_zero(checkpoints.prune)  # after the last evaluation
    return collectives.on_rank_zero(lambda: evaluated_at(folder, 0))
