"""Settings of the training that contradict each other: how long it lasts, when it ends, and what it learns from."""

from omegaconf import DictConfig

from rlhf.errors import ConfigError
from rlhf.models.roles import MOVING_REFERENCE
from rlhf.pipeline.config import instantiate
from rlhf.policy_settings import METHODS, BestOfNSettings, PolicySettings
from rlhf.settings import JOINED, Settings, SFTSettings
from rlhf.stages.reference import Rule

# Keys of `ppo` that only a value function reads, and what they are without one, as a value and as a word.
WITHOUT_VALUES = {"value_model": ("none", "none"), "value_coef": (0.0, "0"), "value_bias": (False, "false"),
                  "value_clip_range": (None, "null"), "lam": (1.0, "1")}  # fmt: skip


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
    for key, plain in (("loss_aggregation", "token_mean"), ("ratio", "token")):
        if ppo.accumulation == "as_published" and getattr(ppo, key) != plain:
            raise ConfigError(
                f"ppo.{key}={getattr(ppo, key)}: ppo.accumulation=as_published reproduces a code that has "
                f"{plain}; allowed: {plain}, or ppo.accumulation=exact"
            )
    _check_warmup("ppo", ppo)
    if ppo.schedule_steps is not None and ppo.schedule_steps < ppo.steps:
        raise ConfigError(
            f"ppo.schedule_steps={ppo.schedule_steps} ends before ppo.steps={ppo.steps}, and the rest would train at "
            "rate 0; allowed: as many steps or more, or null"
        )


def check_reference(config: DictConfig, settings: Settings) -> None:
    """The reference is a rule, and something is measured from it if it moves.

    Raises:
        ConfigError: it is none, or nothing is.
    """
    rule, chosen = instantiate(config.reference, "reference"), config.reference._target_
    if not isinstance(rule, Rule):
        raise ConfigError(f"reference._target_={chosen} is no rule; allowed: a class with `role` and `move`")
    if rule.role == MOVING_REFERENCE and settings.divergence.input == "none":
        raise ConfigError(
            f"reference._target_={chosen} moves what the penalty is measured from, and divergence=none has none; "
            "allowed: reference=fixed or reset, or a divergence"
        )


def check_advantages(settings: Settings) -> None:
    """What the advantages are measured against is there, and nothing is configured that they do not use.

    Raises:
        ConfigError: two keys contradict each other.
    """
    ppo, chosen, samples = settings.ppo, settings.advantages, settings.generation.samples_per_prompt
    if chosen.baseline == "value" and ppo.value_model == "none":
        raise ConfigError(
            f"ppo.value_model=none: advantages={chosen.name} needs a value function; "
            "allowed: adapter, trunk_head or full, or advantages such as rloo"
        )
    for key, (unused, word) in WITHOUT_VALUES.items() if chosen.baseline != "value" else ():
        if getattr(ppo, key) != unused:
            raise ConfigError(
                f"ppo.{key}={getattr(ppo, key)}: advantages={chosen.name} uses no value function; allowed: {word}"
            )
    if chosen.baseline == "group" and samples == 1:
        raise ConfigError(
            f"generation.samples_per_prompt=1: advantages={chosen.name} compares answers to a prompt; allowed: 2 or "
            "more"
        )
    if chosen.baseline == "greedy" and ppo.score_transform != "none":
        raise ConfigError(
            f"ppo.score_transform={ppo.score_transform}: advantages={chosen.name} subtracts the score of a greedy "
            "answer, which is not transformed; allowed: none"
        )
    for key in ("rollout_batch_size", "minibatch_size"):
        if getattr(ppo, key) % samples:
            raise ConfigError(
                f"ppo.{key}={getattr(ppo, key)} cuts the {samples} answers to a prompt apart; allowed: a multiple of "
                f"generation.samples_per_prompt={samples}"
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
