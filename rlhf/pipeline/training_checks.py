"""Settings of the training that contradict each other: how long it lasts, when it ends, and what it learns from."""

from rlhf.errors import ConfigError
from rlhf.policy_settings import METHODS, BestOfNSettings, PolicySettings
from rlhf.settings import JOINED, Settings, SFTSettings


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
    _check_warmup("ppo", ppo)
    if ppo.schedule_steps is not None and ppo.schedule_steps < ppo.steps:
        raise ConfigError(
            f"ppo.schedule_steps={ppo.schedule_steps} ends before ppo.steps={ppo.steps}, and the rest would train at "
            "rate 0; allowed: as many steps or more, or null"
        )


def _check_warmup(method: str, settings: PolicySettings) -> None:
    """The warm-up ends before the training."""
    if settings.warmup_steps >= settings.steps:
        raise ConfigError(
            f"{method}.warmup_steps={settings.warmup_steps} must be below {method}.steps={settings.steps}"
        )


def check_dpo(settings: Settings) -> None:
    """The loss of DPO is one that was derived for its divergence, and the training outlasts its warm-up.

    Raises:
        ConfigError: two keys of `dpo` contradict each other.
    """
    dpo = settings.dpo
    _check_warmup("dpo", dpo)
    if dpo.loss == "ipo" and dpo.divergence != "reverse_kl":
        raise ConfigError(
            f"dpo.divergence={dpo.divergence}: the target 1/(2β) of dpo.loss=ipo is one of log-ratios; allowed: "
            "reverse_kl, or dpo.loss=sigmoid"
        )
    if dpo.clip is not None and dpo.loss != "sigmoid":
        raise ConfigError(
            f"dpo.clip={dpo.clip} bounds a margin, and dpo.loss={dpo.loss} does so by itself; allowed: null, or "
            "dpo.loss=sigmoid"
        )
    if dpo.unbiased and not dpo.label_smoothing:
        raise ConfigError(
            "dpo.unbiased=true corrects for flipped labels, and dpo.label_smoothing=0 says that none are; allowed: "
            "false, or the share of flipped labels in dpo.label_smoothing"
        )


def check_best_of_n(settings: Settings, method: str) -> None:
    """The steps divide into rounds, and a round's batches into its epochs; the training outlasts its warm-up.

    Raises:
        ConfigError: two keys of the method contradict each other.
    """
    own: BestOfNSettings = getattr(settings, method)
    _check_warmup(method, own)
    if own.steps % own.rounds:
        raise ConfigError(
            f"{method}.rounds={own.rounds} does not divide {method}.steps={own.steps}; allowed: a divisor of it"
        )
    if own.steps_per_round * own.batch_size % own.epochs:
        raise ConfigError(
            f"{method}.epochs={own.epochs} does not divide the {own.steps_per_round * own.batch_size} answers that a "
            f"round learns from ({method}.steps / rounds x batch_size); allowed: a divisor of it"
        )
    if own.n == 1:
        raise ConfigError(f"{method}.n=1 leaves nothing to choose from; allowed: 2 or more")


def check_patience(settings: Settings, stage: str, metric: str | None) -> None:
    """A plateau is one of the metric that `keep_best` of the method stands for (`rlhf.pipeline.plateau`).

    Raises:
        ConfigError: it stands for none.
    """
    method, own = stage if stage in METHODS else "ppo", settings.method(stage)
    if own.patience is not None and metric is None:
        raise ConfigError(
            f"{method}.patience={own.patience} needs a metric to wait for, and {method}.keep_best={own.keep_best} is "
            f"none here; allowed: {method}.patience=null, or {method}.keep_best=eval/reward"
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
