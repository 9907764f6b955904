"""Settings of the training that contradict each other: how long it lasts, when it ends, and what it learns from."""

from rlhf.errors import ConfigError
from rlhf.settings import JOINED, PPOSettings, Settings, SFTSettings


def check_ppo(settings: Settings) -> None:
    """Batches divide into their parts, and the training is long enough for its schedule.

    Raises:
        ConfigError: two keys of `ppo` contradict each other.
    """
    ppo = settings.ppo
    if ppo.rollout_batch_size % ppo.minibatch_size:
        raise ConfigError(
            f"ppo.minibatch_size={ppo.minibatch_size} does not divide ppo.rollout_batch_size={ppo.rollout_batch_size}; "
            "allowed: a divisor of it"
        )
    if ppo.accumulation == "as_published" and ppo.minibatch_size % ppo.published_rows:
        raise ConfigError(
            f"ppo.published_rows={ppo.published_rows} does not divide ppo.minibatch_size={ppo.minibatch_size}; "
            "allowed: a divisor of it"
        )
    _check_length(ppo)


def _check_length(ppo: PPOSettings) -> None:
    """The warm-up ends before the training, and the schedule not before it."""
    if ppo.warmup_steps >= ppo.steps:
        raise ConfigError(f"ppo.warmup_steps={ppo.warmup_steps} must be below ppo.steps={ppo.steps}")
    if ppo.schedule_steps is not None and ppo.schedule_steps < ppo.steps:
        raise ConfigError(
            f"ppo.schedule_steps={ppo.schedule_steps} ends before ppo.steps={ppo.steps}, and the rest would train at "
            "rate 0; allowed: as many steps or more, or null"
        )


def check_patience(ppo: PPOSettings, metric: str | None) -> None:
    """A plateau is one of the metric that `ppo.keep_best` stands for (`rlhf.pipeline.plateau`).

    Raises:
        ConfigError: it stands for none.
    """
    if ppo.patience is not None and metric is None:
        raise ConfigError(
            f"ppo.patience={ppo.patience} needs a metric to wait for, and ppo.keep_best={ppo.keep_best} is none here; "
            "allowed: ppo.patience=null, or ppo.keep_best=eval/reward"
        )


def check_packing(sft: SFTSettings) -> None:
    """Joined texts have no prompts (`rlhf.stages.joining`).

    Raises:
        ConfigError: the loss is on responses alone.
    """
    if sft.packing == JOINED and sft.loss_on != "text":
        raise ConfigError(
            f"sft.loss_on={sft.loss_on}, but sft.packing=joined cannot tell responses from prompts; allowed: "
            "sft.loss_on=text, or sft.packing=true"
        )
