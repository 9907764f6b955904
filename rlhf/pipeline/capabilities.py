"""What models, groups of processes and vLLM can do, checked before any model is loaded."""

import importlib.util
import inspect
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from rlhf.data.chat_template import ChatTemplate
from rlhf.data.records import DataSource
from rlhf.data.templates import PromptTemplate
from rlhf.distributed import processes
from rlhf.errors import ConfigError, missing_package
from rlhf.models.architecture import check_architecture, has_classifier, is_recurrent
from rlhf.models.loading import load_tokenizer, skeleton
from rlhf.pipeline.adapter_checks import check_layers
from rlhf.policy_settings import FROM_COMPARISONS, METHODS
from rlhf.rollout.vllm import NOT_YOURS, RANKS, TEMPERATURES
from rlhf.settings import ModelSettings, Settings, is_quantized


def check_files(model: ModelSettings) -> None:
    """Check dtype and place of a model, without reading its files.

    Raises:
        ConfigError: they cannot be used.
    """
    if model.dtype == "float16":
        raise ConfigError("model.dtype=float16 needs loss scaling, which is not built; allowed: float32 or bfloat16")
    name = model.name_or_path
    # a Hub id has at most one slash and does not look like a path
    if name is not None and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise ConfigError(f"model.name_or_path={name}: there is no such folder")
        if model.gguf_file and not (folder / model.gguf_file).is_file():
            raise ConfigError(f"model.gguf_file={model.gguf_file}: there is no such file in {name}")
    if model.gguf_file and importlib.util.find_spec("gguf") is None:
        raise ConfigError(missing_package("model.gguf_file", "gguf", "gguf"))


def check_model(config: DictConfig, settings: Settings, reward_model: bool, simulated: bool) -> None:
    """Check that the architecture can do what is asked of it, and has the layers that adapters are to be put on.

    Nothing is checked if the configuration of the model is not at hand.

    Raises:
        ConfigError: a layer does not exist, or a sequence is longer than the model can read.
        ModelError: the architecture is not supported.
    """
    lm = skeleton(settings.model)
    if lm is None:
        return
    check_architecture(lm, settings.model, _lengths(config, settings, reward_model, simulated))
    check_layers(settings, lm)
    _check_engine(lm, config, settings, simulated)
    trained = config.stage.name == "reward" or (reward_model and config.stage.name in (*METHODS, "evaluate"))
    if trained and settings.reward.lora.r == 0 and settings.reward.from_ is None and not has_classifier(lm):
        raise ConfigError(
            "lora@reward.lora=none: a whole reward model is saved as a sequence classifier, and transformers has none "
            f"for {type(lm).__name__}; allowed: an adapter such as lora@reward.lora=r16_all, or another model"
        )


def _check_engine(lm: PreTrainedModel, config: DictConfig, settings: Settings, simulated: bool) -> None:
    """The native engine's cache holds keys and values only."""
    samples = simulated or config.stage.name in (*METHODS, "evaluate")
    if samples and settings.generation.engine == "native" and is_recurrent(lm):
        raise ConfigError(
            f"generation.engine=native: {type(lm).__name__} keeps a recurrent state, which this engine's cache of keys "
            "and values does not hold; allowed: generation.engine=transformers, or a model with attention in all layers"
        )


def _lengths(config: DictConfig, settings: Settings, reward_model: bool, simulated: bool) -> dict[str, int]:
    """The longest sequence of each stage that will run, in tokens, by the settings that decide it."""
    stage, prompt = config.stage.name, settings.model.max_prompt_tokens
    reward = stage == "reward" or (stage in (*METHODS, "evaluate") and reward_model)
    answers = {}
    if simulated and (reward or stage in ("preferences", *FROM_COMPARISONS)):
        answers["preferences"] = config.preferences.max_new_tokens
    if stage in (*METHODS, "evaluate"):
        answers |= {key: getattr(settings, key).max_new_tokens for key in ("generation", "evaluation")}
    lengths = {f"sft.max_length={settings.sft.max_length}": settings.sft.max_length}
    if stage == "dpo":
        lengths[f"dpo.max_length={settings.dpo.max_length}"] = settings.dpo.max_length
    if reward:
        lengths[f"reward.max_length={settings.reward.max_length}"] = settings.reward.max_length
    for key, new in answers.items():
        both = f"model.max_prompt_tokens={prompt} and {key}.max_new_tokens={new} ({prompt + new} tokens together)"
        lengths[both] = prompt + new
    return lengths


def check_processes(config: DictConfig, settings: Settings) -> None:
    """Check that the trainer's number of processes is available, and that so many can share this run.

    Raises:
        ConfigError: they are not, or cannot.
    """
    trainer, place = config.trainer, processes.cluster_environment()
    here, nodes = processes.local_world_size(trainer), trainer.get("num_nodes", 1)
    wanted, started = here * nodes, place.world_size() if place else None
    if wanted > 1 and not trainer.get("strategy"):
        raise ConfigError(f"trainer.devices={trainer.devices}: one process uses one device; allowed: 1, or trainer=ddp")
    if started is not None and started != wanted:
        raise ConfigError(
            f"trainer.devices={trainer.get('devices')} on trainer.num_nodes={nodes} makes {wanted} processes, but "
            f"{started} were started (by torchrun or srun); allowed: as many"
        )
    if nodes > 1 and started is None:
        raise ConfigError(
            f"trainer.num_nodes={nodes}: processes on other nodes are started by torchrun, or by hydra/launcher=slurm "
            "with hydra.launcher.nodes and hydra.launcher.tasks_per_node; allowed here: trainer.num_nodes=1"
        )
    if trainer.get("accelerator") != "cpu" and 0 < torch.cuda.device_count() < here:
        raise ConfigError(f"trainer.devices={here}, but there are {torch.cuda.device_count()} GPUs here")
    prompts = settings.ppo.minibatch_size // settings.generation.samples_per_prompt  # whose answers stay together
    policy = [settings.dpo.batch_size, settings.best_of_n.batch_size, settings.expert_iteration.batch_size]
    smallest = min(settings.sft.batch_size, settings.reward.batch_size, prompts, *policy)
    if wanted > smallest:
        raise ConfigError(
            f"{wanted} processes, but a batch of {smallest} rows (sft.batch_size, reward.batch_size, "
            "ppo.minibatch_size / generation.samples_per_prompt, or batch_size of another method): each needs a row; "
            "allowed: fewer processes or larger batches"
        )
    if wanted > 1 and settings.ppo.accumulation == "as_published":
        raise ConfigError("ppo.accumulation=as_published reproduces what one process did; allowed: trainer.devices=1")
    if processes.num_shards(trainer) > 1:
        _check_sharding(config.stage.name, settings)


def _check_sharding(stage: str, settings: Settings) -> None:
    """Only a frozen, unquantized base can be sharded."""
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise ConfigError(
            f"trainer=fsdp needs torch 2.7 or later, and this is {torch.__version__}; allowed: trainer=ddp"
        )
    if settings.model.compile:
        raise ConfigError("model.compile=true is untested with trainer=fsdp; allowed: false, or trainer=ddp")
    if is_quantized(settings.quantization):
        raise ConfigError("trainer=fsdp cannot share out a quantized base; allowed: quantization=none, or trainer=ddp")
    loras = {"lora@sft.lora": settings.sft.lora, "lora@reward.lora": settings.reward.lora, "lora": settings.lora}
    for key in list(loras)[: {"sft": 1, "preferences": 1, "reward": 2}.get(stage, 3)]:
        if loras[key].r == 0:
            raise ConfigError(
                f"{key}=none trains the base itself, of which trainer=fsdp leaves each process but a share; "
                f"allowed: an adapter such as {key}=r8, or trainer=ddp"
            )
    if settings.ppo.value_model == "full" and stage in ("ppo", "evaluate"):
        raise ConfigError(
            "ppo.value_model=full trains a whole model, which trainer=fsdp cannot share out; allowed: adapter"
        )


def check_vllm(config: DictConfig, settings: Settings) -> None:
    """Check that vLLM is available and can do what is asked of it.

    Raises:
        ConfigError: it is not, or cannot.
    """
    if settings.generation.engine != "vllm":
        return
    lora, other = settings.lora, "or generation.engine=native"
    if not 0 < lora.r <= RANKS[-1]:
        raise ConfigError(
            f"generation.engine=vllm swaps adapters, and lora.r={lora.r} (lora=none has 0) makes none that it takes; "
            f"allowed: lora=r8 and others up to {RANKS[-1]}, {other}"
        )
    if is_quantized(settings.quantization):
        raise ConfigError(
            "generation.engine=vllm would sample from the model before quantization rounds it; "
            f"allowed: quantization=none, {other}"
        )
    if settings.model.dtype != "bfloat16":
        raise ConfigError(
            f"generation.engine=vllm runs adapters in 16 bits only, and model.dtype={settings.model.dtype}; "
            f"allowed: model.dtype=bfloat16, {other}"
        )
    if processes.local_world_size(config.trainer) * config.trainer.get("num_nodes", 1) > 1:
        raise ConfigError(f"generation.engine=vllm is built for one process; allowed: trainer.devices=1, {other}")
    for key in settings.generation.vllm.keys() & set(NOT_YOURS):
        raise ConfigError(
            f"generation.vllm.{key}={settings.generation.vllm[key]} is not allowed; allowed: keywords of vllm.LLM but "
            f"{', '.join(NOT_YOURS)}, which the engine sets itself or which would change what is sampled"
        )
    low, high = TEMPERATURES
    for key in ("generation", "evaluation"):
        temperature = getattr(settings, key).temperature
        if not (low <= temperature <= high or temperature == 0):
            raise ConfigError(
                f"{key}.temperature={temperature}: generation.engine=vllm takes {low} to {high}; allowed: that, {other}"
            )
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(missing_package("generation.engine=vllm", "vllm", "vllm"))
    if not torch.cuda.is_available():
        raise ConfigError(
            "generation.engine=vllm, but torch sees no GPU here; allowed: generation.engine=native or transformers"
        )


def check_template(settings: Settings, source: DataSource) -> None:
    """A chat template must exist, be readable for each model, and tell turns apart if earlier ones are learnt.

    Raises:
        ConfigError, DataError: it does not.
    """
    template: PromptTemplate | None = getattr(source, "template", None)
    if isinstance(template, ChatTemplate):
        template.check()
        if settings.reward.model:
            load_tokenizer(settings.reward.model, source)
    if settings.sft.loss_on != "assistant":
        return
    if not isinstance(template, ChatTemplate):
        raise ConfigError(
            "sft.loss_on=assistant needs data/template=chat, which tells turns apart; allowed: response or text"
        )
    _ = template.earlier_turn
