"""Contradictions between parts of a configuration, found before any model is loaded."""

from dataclasses import replace

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from rlhf.data.records import DataSource, as_records
from rlhf.errors import ConfigError
from rlhf.evaluation.difficulty import load_difficulties
from rlhf.evaluation.prompts import instruction_or_prompt
from rlhf.pipeline.adapter_checks import check_adapters
from rlhf.pipeline.capabilities import check_files, check_model, check_processes, check_template, check_vllm
from rlhf.pipeline.config import instantiate, needs, needs_reward_model, nodes, target_class
from rlhf.pipeline.evaluating import best_metric, check_judge_reads, reads_words
from rlhf.pipeline.extras import check_extras
from rlhf.pipeline.fetching import data_sets
from rlhf.pipeline.identity import IGNORED_TRAINER_KEYS, LIGHTNING
from rlhf.pipeline.kept_policies import check_keeping
from rlhf.pipeline.members import check_margins, check_members
from rlhf.pipeline.taken import taken_of
from rlhf.pipeline.training_checks import (
    check_advantages,
    check_best_of_n,
    check_dpo,
    check_packing,
    check_patience,
    check_ppo,
    check_reference,
)
from rlhf.pipeline.users_functions import named_function, try_advantages, try_divergence
from rlhf.placement import Placement
from rlhf.policy_settings import FROM_COMPARISONS, METHODS
from rlhf.scorers import scores_texts
from rlhf.scorers.columns import check_columns
from rlhf.settings import LoraSettings, Settings, is_quantized

# What to choose by a key, rather than an option that needs the gold utility of a data set.
WITHOUT_UTILITY = {
    "judge": "judge=reward_model, judge=none (no win rate), or another judge",
    "scorer": "scorer=reward_model, scorer=function, or another scorer",
}
# Keys of Lightning's trainer for which the stages have keys of their own: (Lightning's, ours).
INSTEAD = (
    (("max_epochs", "min_epochs"), "sft.epochs, reward.epochs and the steps of the method, such as ppo.steps"),
    (
        ("max_steps", "min_steps", "max_time", "limit_train_batches", "overfit_batches"),
        "sft.max_steps, reward.max_steps and the steps of the method, such as ppo.steps",
    ),
    (("fast_dev_run", "barebones"), "debug=quick"),
    (
        ("limit_val_batches", "num_sanity_val_steps"),
        "sft.validation_size, reward.validation_size and evaluation.prompts",
    ),
    (("val_check_interval", "check_val_every_n_epoch"), "eval_every of the method, such as ppo.eval_every"),
    (("accumulate_grad_batches",), "sft.microbatch_tokens, reward.microbatch_tokens and ppo.microbatch_tokens"),
    (
        ("gradient_clip_val", "gradient_clip_algorithm"),
        "sft.max_grad_norm, reward.max_grad_norm and ppo.max_grad_norm",
    ),
    (("precision",), "model.dtype"),
    (("logger",), "logger=csv, tensorboard or wandb"),
    (("enable_checkpointing",), "sft.checkpoint_every, reward.checkpoint_every and ppo.checkpoint_every"),
)


def check(config: DictConfig, settings: Settings, source: DataSource) -> None:
    """Refuse a configuration whose parts contradict each other, or that this machine cannot run.

    Raises:
        ConfigError: one sentence that names the key, its value and what is allowed.
        DataError: a file of the data set is missing.
        ModelError: the model cannot be used as configured.
    """
    # 1. What each part says by itself.
    if config.resume not in ("auto", "must", "never"):
        raise ConfigError(f"resume={config.resume} is not allowed; allowed: auto, must or never")
    _check_method(config, settings)
    for key in ("scorer.function", "evaluation.gold.function"):
        if OmegaConf.select(config, key):
            named_function(key, OmegaConf.select(config, key))
    check_trainer(config)
    check_files(settings.model)
    check_packing(settings.sft)
    check_adapters(config, settings)
    Placement.of(instantiate(config.kl, "kl"), settings.divergence)
    check_reference(config, settings)
    # 2. What parts need of each other.
    _check_quantization(config, settings)
    simulated = _check_preferences(config, source)
    check_members(config, settings)
    check_margins(config, settings, source, simulated)
    if settings.reward.group_prompts and not simulated and "preference_validation" not in source.splits:
        raise ConfigError(
            "reward.group_prompts=true: without a split preference_validation, comparisons are shuffled, and those of "
            "a prompt part; allowed: reward.group_prompts=false"
        )
    if config.policy is not None and config.stage.name != "evaluate":
        raise ConfigError(f"policy={config.policy} is what stage=evaluate measures; allowed: null with other stages")
    if config.stage.name in (*METHODS, "evaluate"):
        check_evaluation(config, settings, source, simulated)
        check_extras(config, settings, source)
        _check_loss_terms(settings)
    # 3. What this machine and these models can do.
    check_processes(config, settings)
    check_vllm(config, settings)
    check_model(config, settings, needs_reward_model(config), simulated)
    if settings.reward.model:
        own = replace(settings, model=settings.reward.model, lora=LoraSettings(r=0))
        check_files(own.model)
        check_model(config, own, needs_reward_model(config), simulated)
    taken_of(settings, source)
    # 4. The data set: its template and its files.
    check_template(settings, source)
    if hasattr(source, "check"):
        source.check()


def check_trainer(config: DictConfig) -> None:
    """Refuse what would change how long or in which precision a stage trains, past the stage's own settings.

    Raises:
        ConfigError: a key of Lightning's trainer that the stages ignore or set themselves, or no GPU.
    """
    if config.trainer.get("accelerator") in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator=gpu, but torch sees no GPU here; allowed: trainer=cpu or trainer=auto")
    if config.trainer._target_ not in LIGHTNING:
        return  # the keys of a user's own trainer are part of the run's identity
    for key in config.trainer:
        if str(key) not in IGNORED_TRAINER_KEYS:
            harmless = ", ".join(f"trainer.{name}" for name in sorted(IGNORED_TRAINER_KEYS - {"_target_"}))
            instead = next((ours for theirs, ours in INSTEAD if key in theirs), harmless)
            raise ConfigError(f"trainer.{key} would silently change what is trained; allowed: {instead}")


# -- what each part says by itself -------------------------------------------------------------------------------------


def _check_method(config: DictConfig, settings: Settings) -> None:
    stage = config.stage.name
    if stage == "dpo":
        check_dpo(settings)
    elif stage in ("best_of_n", "expert_iteration"):
        check_best_of_n(settings, stage)
    else:
        check_ppo(settings)
        check_advantages(settings)
        try_advantages(settings.advantages)
    check_keeping(settings, stage)
    try_divergence(settings.divergence)


def _check_loss_terms(settings: Settings) -> None:
    for name, term in settings.loss_terms.items():
        named_function(f"loss_terms.{name}.function", term.function)


# -- what parts need of each other -------------------------------------------------------------------------------------


def _check_quantization(config: DictConfig, settings: Settings) -> None:
    """A quantized base cannot be trained, only adapters on it."""
    if not is_quantized(settings.quantization):
        return
    stage = config.stage.name
    for key, lora in (("lora", settings.lora), ("lora@reward.lora", settings.reward.lora)):
        if lora.r == 0 and stage in (METHODS if key == "lora" else ("reward",)):
            raise ConfigError(
                f"{key}=none trains the base itself, which quantization forbids; choose an adapter such as lora=r8"
            )
    if settings.sft.lora.r == 0 and stage == "sft":
        raise ConfigError("lora@sft.lora=none trains the base itself: use lora@sft.lora=r8 or quantization=none")
    if settings.ppo.value_model == "full" and stage == "ppo":
        raise ConfigError(
            "ppo.value_model=full trains a model of its own, which quantization forbids; allowed: adapter"
        )


def _check_preferences(config: DictConfig, source: DataSource) -> bool:
    """Check the preference source; return whether it is simulated."""
    preferences = instantiate(config.preferences, "preferences", _recursive_=False)
    if not hasattr(preferences, "simulated"):
        chosen = config.preferences._target_
        raise ConfigError(f"preferences._target_={chosen} makes no preferences; allowed: a class that says `simulated`")
    if not preferences.simulated:
        if config.stage.name == "preferences":
            raise ConfigError("stage=preferences makes comparisons, which the data set has: use preferences=simulated")
        if config.stage.name in FROM_COMPARISONS and "preference" not in source.splits:
            raise ConfigError(
                f"stage={config.stage.name} learns from comparisons, and the data set has none; allowed: "
                "preferences=simulated"
            )
        return False
    _check_needs(config, "preferences.judge", source, simulated=True)
    if needs(config, "preferences.judge", "needs_reward_model"):
        raise ConfigError(
            "preferences.judge needs the reward model of this run, which is to learn from its verdicts; "
            "allowed: gold, llm_pool, or finished_reward_model with the folder of another"
        )
    preferences.check(source.splits)
    return True


def check_evaluation(
    config: DictConfig,
    settings: Settings,
    source: DataSource,
    simulated: bool,
    keys: tuple[str, ...] = ("scorer", "judge"),
) -> None:
    """Check that scorer, judge and evaluation have what they need, and are content with their own configuration.

    Raises:
        ConfigError: one sentence that names the key, its value and what is allowed.
    """
    for key in keys:
        _check_needs(config, key, source, simulated)
    if not data_sets(OmegaConf.to_container(config.data, resolve=True)):  # type: ignore[arg-type]
        for key in [key for key in ("scorer.function", "evaluation.gold.function") if OmegaConf.select(config, key)]:
            check_columns(key, named_function(key, OmegaConf.select(config, key)), source)
    if settings.evaluation.gold:
        _check_gold(config, source)
    for key in (*keys, "evaluation.factscore", "evaluation.gold"):
        _check_own(config, key)
    check_patience(settings, config.stage.name, best_metric(config, settings, source))
    if "eval" in source.splits and not settings.evaluation.factscore:
        rows = as_records(source.load("eval"), "eval") if reads_words(config) else []
        check_judge_reads(config, [text for row in rows for text in (row.prompt, row.reference_output or "")])
    if settings.evaluation.best_of > 1 and settings.evaluation.temperature == 0:
        raise ConfigError(
            "evaluation.best_of above 1 needs evaluation.temperature above 0: greedy answers are all alike"
        )
    if settings.evaluation.difficulty:
        _check_difficulty(config, settings, source)


def _check_gold(config: DictConfig, source: DataSource) -> None:
    """A gold score reads texts, and FActScore's metrics would replace it."""
    target = target_class(config.evaluation.gold, "evaluation.gold")
    if not scores_texts(target):
        raise ConfigError(
            f"evaluation.gold._target_={config.evaluation.gold._target_} does not score texts; allowed: "
            "bag_of_words, bag_of_characters, sentiment, hub_reward_model, function or gold as scorer@evaluation.gold"
        )
    if config.evaluation.get("factscore"):
        raise ConfigError("evaluation.gold has no place in evaluation=factscore; allowed: one of the two")
    _check_needs(config, "evaluation.gold", source, simulated=False)


def _check_needs(config: DictConfig, key: str, source: DataSource, simulated: bool) -> None:
    """The class of a group declares what it needs (`needs_reward_model` and its like); the data set must have it."""
    node = OmegaConf.select(config, key)
    group = {"preferences.judge": "judge@preferences.judge", "evaluation.gold": "scorer@evaluation.gold"}.get(key, key)
    choice = HydraConfig.get().runtime.choices.get(group, "") if HydraConfig.initialized() else node._target_
    if not hasattr(target_class(node, key), "needs_reward_model"):
        raise ConfigError(
            f"{key}._target_={node._target_} is no {key}; allowed: a class that says `needs_reward_model`"
        )
    if needs(config, key, "needs_utility") and not hasattr(source, "utility"):
        raise ConfigError(
            f"{key}={choice} needs a data set with a gold utility, which only data=farm has; allowed: "
            f"{WITHOUT_UTILITY.get(key, f'another {key}')}"
        )
    if needs(config, key, "needs_labels") and not hasattr(source, "labelled"):
        raise ConfigError(
            f"{key}={choice} learns from labelled reviews, which only data=imdb has; allowed: another {key}"
        )
    trained = needs(config, key, "needs_reward_model") and not config.reward.get("from")
    if trained and not simulated and "preference" not in source.splits:
        raise ConfigError(
            f"{key}={choice} needs a reward model, but the data set has no preference split to train one on; "
            "allowed: reward.from, or another choice"
        )


def _check_own(config: DictConfig, key: str) -> None:
    """Let the class of a group, and the classes nested in its configuration, check their own keys."""
    for node in nodes(OmegaConf.select(config, key)):
        own = getattr(target_class(node, key), "check", None) if "_target_" in node else None
        if own:
            own(OmegaConf.to_container(node, resolve=True))


def _check_difficulty(config: DictConfig, settings: Settings, source: DataSource) -> None:
    """Length control by difficulty needs a win rate, and a file that knows every instruction."""
    path = settings.evaluation.difficulty
    if settings.evaluation.factscore or not getattr(target_class(config.judge, "judge"), "compares", True):
        raise ConfigError(f"evaluation.difficulty={path} needs a judge that compares; allowed: null without one")
    held_out = [instruction_or_prompt(row) for row in as_records(source.load("eval"), "eval")]
    load_difficulties(str(path), held_out, settings.evaluation.prompts)
