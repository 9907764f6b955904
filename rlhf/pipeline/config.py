"""From a composed configuration to checked settings: what cannot run fails here, before any model is loaded."""

import importlib.util
import inspect
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf import root
from rlhf.data.records import DataSource, Prompt
from rlhf.errors import ConfigError, DataError
from rlhf.evaluation.difficulty import load_difficulties
from rlhf.evaluation.evaluator import evaluation_metrics
from rlhf.evaluation.prompts import instruction_or_prompt
from rlhf.pipeline.capabilities import check_model, check_processes, check_vllm
from rlhf.pipeline.identity import HARMLESS, LIGHTNING
from rlhf.settings import Settings, is_quantized, typed

# groups that name a class by `_target_`
CLASSES = ("data", "scorer", "judge", "preferences", "kl", "trainer", "logger")
# keys of Lightning's trainer for which the stages have keys of their own: (theirs, ours)
INSTEAD = (
    (("max_epochs", "min_epochs"), "sft.epochs, reward.epochs and ppo.steps"),
    (
        ("max_steps", "min_steps", "max_time", "limit_train_batches", "overfit_batches"),
        "sft.max_steps, reward.max_steps and ppo.steps",
    ),
    (("fast_dev_run", "barebones"), "debug=quick"),
    (
        ("limit_val_batches", "num_sanity_val_steps"),
        "sft.validation_size, reward.validation_size and evaluation.prompts",
    ),
    (("val_check_interval", "check_val_every_n_epoch"), "ppo.eval_every"),
    (("accumulate_grad_batches",), "sft.microbatch_tokens, reward.microbatch_tokens and ppo.microbatch_tokens"),
    (
        ("gradient_clip_val", "gradient_clip_algorithm"),
        "sft.max_grad_norm, reward.max_grad_norm and ppo.max_grad_norm",
    ),
    (("precision",), "model.dtype"),
    (("logger",), "logger=csv, tensorboard or wandb"),
    (("enable_checkpointing",), "sft.checkpoint_every, reward.checkpoint_every and ppo.checkpoint_every"),
)
# what a signature may ask for → what is taken for it, and its name
NUMBERS: dict[Any, tuple[Any, str]] = {
    int: (int, "a whole number"),
    float: (int | float, "a number"),
    bool: (bool, "true or false"),
    NoneType: (NoneType, "null"),
}


def settings_of(config: DictConfig) -> Settings:
    """The typed settings of a composed configuration.

    Raises:
        ConfigError: a key that does not exist, a value of the wrong type or outside what is allowed.
    """
    _check_groups(config)
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"{missing[0]} has no value, and there is no default for it")
    try:
        chosen: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or ''}: {str(error).partition(chr(10))[0]}") from error
    return typed(Settings, {field.name: chosen[field.name] for field in fields(Settings)})


def _check_groups(config: DictConfig) -> None:
    """Each group that is a class by itself names one; `judge=null` would leave none."""
    for group, key in (("stage", "name"), *((group, "_target_") for group in CLASSES)):
        chosen = config.get(group)
        options = sorted(path.stem for path in (root() / "conf" / group).glob("*.yaml"))
        if not isinstance(chosen, DictConfig) or OmegaConf.is_missing(chosen, key) or not chosen.get(key):
            raise ConfigError(f"{group}={chosen} has no {key}; allowed: {', '.join(options)}")
        if group == "stage" and chosen.name not in options:
            raise ConfigError(f"stage.name={chosen.name} is not allowed; allowed: {', '.join(options)}")


def instantiate(config: Any, key: str, *args: Any, **kwargs: Any) -> Any:
    """`hydra.utils.instantiate` whose failures name the key.

    Raises:
        ConfigError: the target cannot be imported, does not take these keys, or not these numbers.
    """
    _check_numbers(config, key)
    try:
        return hydra.utils.instantiate(config, *args, _convert_="all", **kwargs)
    except InstantiationException as error:
        if isinstance(error.__cause__, DataError | ConfigError):
            raise error.__cause__ from None
        raise ConfigError(f"{key}: {error.__cause__ or error}".replace("\n", " ")) from error


def _check_numbers(config: Any, key: str) -> None:
    """See that numbers and truth values are what the target's signature says; Python would not look."""
    hints: dict[str, Any] = {}
    with suppress(HydraException, ValueError, ImportError, AttributeError, NameError, TypeError, KeyError):
        target = hydra.utils.get_object(config["_target_"])  # what is wrong with it is told when it is made
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    for name, value in config.items() if hints else ():
        hint = hints.get(name)
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if all(kind in NUMBERS for kind in kinds) and not any(_is(value, kind) for kind in kinds):
            allowed = " or ".join(NUMBERS[kind][1] for kind in kinds)
            raise ConfigError(f"{key}.{name}={value} is not allowed; allowed: {allowed}")


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind of number; for Python a bool is an int."""
    return isinstance(value, NUMBERS[kind][0]) and (kind is bool or not isinstance(value, bool))


def data_source(config: DictConfig) -> DataSource:
    """The data set that `data` describes; nothing of it is read yet.

    Raises:
        ConfigError: the target cannot be imported, does not take these keys, or is no data set.
    """
    source = instantiate(config.data, "data")
    if not isinstance(source, DataSource):
        raise ConfigError(f"data._target_={config.data._target_} is no data set; allowed: one with `splits` and `load`")
    return source


def target_class(node: DictConfig, key: str) -> Any:
    """The class or function that a `_target_` in the group `key` names, without making one."""
    try:
        return hydra.utils.get_object(node._target_)
    except (HydraException, ValueError, ImportError, AttributeError) as error:
        raise ConfigError(
            f"{key}._target_={node._target_} cannot be imported; allowed: a class as package.module.Name"
        ) from error


def needs(config: DictConfig, key: str, what: str) -> bool:
    """Whether the class that a group names, or one inside its configuration, has `what` set (`needs_reward_model`)."""
    nested = [node for node in _nodes(OmegaConf.select(config, key)) if "_target_" in node]
    return any(getattr(target_class(node, key), what, False) for node in nested)


def needs_reward_model(config: DictConfig) -> bool:
    """Whether the scorer or the judge reads a reward model."""
    return any(needs(config, key, "needs_reward_model") for key in ("scorer", "judge"))


def _nodes(node: Any) -> Iterator[DictConfig]:
    if isinstance(node, DictConfig):
        yield node
        for child in node.values():
            yield from _nodes(child)
    elif isinstance(node, ListConfig):
        for child in node:
            yield from _nodes(child)


def check(config: DictConfig, settings: Settings, source: DataSource) -> None:
    """Contradictions between groups.

    Raises:
        ConfigError: one sentence that names the key, the value and what is allowed.
        DataError: a file of the data set is missing.
    """
    _check_ppo(settings)
    quantized = is_quantized(settings.quantization)
    for key, lora in (("lora", settings.lora), ("lora@reward.lora", settings.reward.lora)):
        if quantized and lora.r == 0 and config.stage.name in ("ppo", key.partition("@")[2].partition(".")[0]):
            raise ConfigError(
                f"{key}=none trains the base itself, which quantization forbids; choose an adapter such as lora=r8"
            )
    if settings.sft.lora.r == 0 and quantized and config.stage.name == "sft":
        raise ConfigError("lora@sft.lora=none trains the base itself: use lora@sft.lora=r8 or quantization=none")
    if quantized and settings.ppo.value_model == "full" and config.stage.name == "ppo":
        raise ConfigError(
            "ppo.value_model=full trains a model of its own, which quantization forbids; allowed: adapter"
        )
    simulated = _check_preferences(config, source)
    check_trainer(config)
    if config.stage.name in ("ppo", "evaluate"):
        for key in ("scorer", "judge"):
            _check_needs(config, key, source, simulated)
        _check_own(config, "scorer")
        _check_own(config, "judge")
        _check_own(config, "evaluation.factscore")
        best_metric(config, settings, source)
    if config.scorer.get("function"):
        _check_function("scorer.function", config.scorer.function)
    if config.resume not in ("auto", "must", "never"):
        raise ConfigError(f"resume={config.resume} is not allowed; allowed: auto, must or never")
    if config.trainer.get("accelerator") in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator=gpu, but torch sees no GPU here; allowed: trainer=cpu or trainer=auto")
    check_processes(config, settings)
    check_vllm(config, settings)
    if settings.model.dtype == "float16":
        raise ConfigError("model.dtype=float16 needs loss scaling, which is not built; allowed: float32 or bfloat16")
    if settings.evaluation.best_of > 1 and settings.evaluation.temperature == 0:
        raise ConfigError(
            "evaluation.best_of above 1 needs evaluation.temperature above 0: greedy answers are all alike"
        )
    if settings.evaluation.difficulty and config.stage.name in ("ppo", "evaluate"):
        _check_difficulty(config, settings, source)
    _check_model(settings)
    check_model(config, settings, needs_reward_model(config), simulated)
    instantiate(config.kl, "kl")
    if hasattr(source, "check"):
        source.check()


def check_trainer(config: DictConfig) -> None:
    """Refuse what would change how long or in which precision a stage trains behind its settings' back.

    Raises:
        ConfigError: a key of Lightning's trainer that the stages do not heed, or that they set themselves.
    """
    if config.trainer._target_ not in LIGHTNING:
        return  # a class of the user's own: its keys are part of what a result is known by
    for key in config.trainer:
        if str(key) not in HARMLESS:
            harmless = ", ".join(f"trainer.{name}" for name in sorted(HARMLESS - {"_target_"}))
            instead = next((ours for theirs, ours in INSTEAD if key in theirs), harmless)
            raise ConfigError(f"trainer.{key} would change what is trained unnoticed; allowed: {instead}")


def best_metric(config: DictConfig, settings: Settings, source: DataSource) -> str | None:
    """The metric by which `ppo.keep_best` chooses; None if only the last checkpoints are to be kept.

    Raises:
        ConfigError: it is none that the evaluations of this configuration log.
    """
    chosen = settings.ppo.keep_best
    judged = getattr(target_class(config.judge, "judge"), "compares", True)
    factscore, difficulty = bool(settings.evaluation.factscore), bool(settings.evaluation.difficulty)
    allowed = evaluation_metrics(source, judged, factscore, difficulty)
    if chosen == "auto":
        return next((name for name in ("eval/factscore", "eval/win_rate") if name in allowed), None)
    if chosen is not None and chosen not in allowed:
        raise ConfigError(f"ppo.keep_best={chosen} is not allowed; allowed: auto, null, {', '.join(allowed)}")
    return chosen


def _check_ppo(settings: Settings) -> None:
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
    if ppo.warmup_steps >= ppo.steps:
        raise ConfigError(f"ppo.warmup_steps={ppo.warmup_steps} must be below ppo.steps={ppo.steps}")
    _check_function("divergence.function", settings.divergence.function)


def _check_function(key: str, path: str) -> None:
    try:
        hydra.utils.get_method(path)
    except (ValueError, ImportError, AttributeError) as error:
        raise ConfigError(f"{key}={path} cannot be imported; allowed: a function as package.module.name") from error


def _check_preferences(config: DictConfig, source: DataSource) -> bool:
    """See to who compares what; whether comparisons are simulated."""
    preferences = instantiate(config.preferences, "preferences", _recursive_=False)
    if not hasattr(preferences, "simulated"):
        chosen = config.preferences._target_
        raise ConfigError(f"preferences._target_={chosen} makes no preferences; allowed: a class that says `simulated`")
    if not preferences.simulated:
        if config.stage.name == "preferences":
            raise ConfigError("stage=preferences makes comparisons, which the data set has: use preferences=simulated")
        return False
    _check_needs(config, "preferences.judge", source, simulated=True)
    if needs(config, "preferences.judge", "needs_reward_model"):
        raise ConfigError(
            "preferences.judge needs the reward model of this run, which is to learn from its verdicts; "
            "allowed: gold, llm_pool, or finished_reward_model with the folder of another"
        )
    preferences.check(source.splits)
    return True


def _check_needs(config: DictConfig, key: str, source: DataSource, simulated: bool) -> None:
    node = OmegaConf.select(config, key)
    group = f"judge@{key}" if "." in key else key
    choice = HydraConfig.get().runtime.choices.get(group, "") if HydraConfig.initialized() else node._target_
    target = target_class(node, key)
    if not hasattr(target, "needs_reward_model"):
        raise ConfigError(
            f"{key}._target_={node._target_} is no {key}; allowed: a class that says `needs_reward_model`"
        )
    if needs(config, key, "needs_utility") and not hasattr(source, "utility"):
        raise ConfigError(
            f"{key}={choice} needs a data set with a gold utility, which only data=farm has; choose another {key}"
        )
    if needs(config, key, "needs_labels") and not hasattr(source, "labelled"):
        raise ConfigError(
            f"{key}={choice} learns from labelled reviews, which only data=imdb has; choose another {key}"
        )
    if needs(config, key, "needs_reward_model") and not simulated and "preference" not in source.splits:
        raise ConfigError(
            f"{key}={choice} needs a reward model, but the data set has no preference split to train one on"
        )


def _check_own(config: DictConfig, key: str) -> None:
    """What the class itself, and those inside its configuration, can see to be wrong."""
    for node in _nodes(OmegaConf.select(config, key)):
        check = getattr(target_class(node, key), "check", None) if "_target_" in node else None
        if check:
            check(OmegaConf.to_container(node, resolve=True))


def _check_difficulty(config: DictConfig, settings: Settings, source: DataSource) -> None:
    """That there is a win rate to control, and that the file knows every instruction."""
    path = settings.evaluation.difficulty
    if settings.evaluation.factscore or not getattr(target_class(config.judge, "judge"), "compares", True):
        raise ConfigError(f"evaluation.difficulty={path} needs a judge that compares; allowed: null without one")
    held_out = [instruction_or_prompt(Prompt(**row)) for row in source.load("eval")]
    load_difficulties(str(path), held_out, settings.evaluation.prompts)


def _check_model(settings: Settings) -> None:
    name = settings.model.name_or_path
    if name is not None and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise ConfigError(f"model.name_or_path={name}: there is no such folder")
        if settings.model.gguf_file and not (folder / settings.model.gguf_file).is_file():
            raise ConfigError(f"model.gguf_file={settings.model.gguf_file}: there is no such file in {name}")
    if settings.model.gguf_file and importlib.util.find_spec("gguf") is None:
        raise ConfigError("model.gguf_file needs the package gguf: pip install 'rlhf[gguf]'")
