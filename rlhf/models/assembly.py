"""Assemble the roles of each stage (SFT, reward modelling, PPO) from trunks, adapters and heads."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import ModelError
from rlhf.models.export import ADAPTER, adapter_tensors, load_adapter, saved_head
from rlhf.models.linear_layers import target_names
from rlhf.models.loading import DTYPES, load_causal_lm, load_whole, switch_off_dropout
from rlhf.models.roles import Role, Roles
from rlhf.settings import LoraSettings, ModelSettings, Settings

log = logging.getLogger(__name__)


def lora_config(lora: LoraSettings, model: PreTrainedModel) -> LoraConfig:
    """The settings as peft's `LoraConfig` for an adapter on `model`."""
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted(target_names(lora, model)),
        layers_to_transform=lora.layers_to_transform,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights="gaussian" if lora.init == "gaussian" else True,
    )


def sft_roles(settings: Settings, tokenizer: PreTrainedTokenizerBase, quantization: dict | None) -> Roles:
    """The role `policy` for SFT: an adapter on the pretrained base, or (lora@sft.lora=none) all of it, in float32."""
    full = settings.sft.lora.r == 0
    base = load_causal_lm(
        settings.model,
        tokenizer,
        quantization=None if full else quantization,
        dtype=torch.float32 if full else None,
    )
    roles = Roles(base, DTYPES[settings.model.dtype])
    roles.table["policy"] = Role("base", None if full else "policy")
    if not full:
        roles.add_adapter("base", "policy", lora_config(settings.sft.lora, base))
    roles.train_only("policy")
    return _configured(roles, settings)


def reward_roles(settings: Settings, tokenizer: PreTrainedTokenizerBase, sft: Path, quantization: dict | None) -> Roles:
    """The role `reward` on the SFT model, with a scalar head: an adapter, or (lora@reward.lora=none) the whole model.

    `sft` is the folder of the SFT model.
    """
    full = settings.reward.lora.r == 0
    base = load_causal_lm(
        settings.model, tokenizer, sft, None if full else quantization, torch.float32 if full else None
    )
    roles = Roles(base, DTYPES[settings.model.dtype])
    roles.table["reward"] = Role("base", None if full else "reward")
    if not full:
        roles.add_adapter("base", "reward", lora_config(settings.reward.lora, base))
    roles.add_head("reward", zero=False)
    roles.train_only("reward")
    return _configured(roles, settings)


def ppo_roles(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    sft: Path,
    reward: Path | None,
    quantization: dict | None,
    only_judges: bool = False,
    beside: str | None = None,
    members: Sequence[Path] = (),
) -> Roles:
    """The roles `policy`, `value`, `reference` and, if there is a reward model, `reward`, on as few trunks as possible.

    `beside` is a further role, which begins as the policy does and is not trained (`rlhf.stages.reference`).

    The value function, if there is one, starts as the reward model, with a zero head; without a reward model, or with
    one that `only_judges`, as the SFT model. `sft` and `reward` are folders, and so are `members`, further reward
    models, which become the roles `reward_1`, `reward_2`, ….
    """
    # 1. The SFT model is the reference. The reward model is an adapter on it, or a trunk of its own.
    base = load_causal_lm(settings.model, tokenizer, sft, quantization)
    roles = Roles(base, DTYPES[settings.model.dtype])
    judge, reward = (reward, None) if only_judges else (None, reward)
    reward_config = _add_reward(roles, reward) if reward is not None else None

    # 2. What is trained. Models that only judge or score come last, so that they change no random number of those.
    add_policy_and_value(roles, settings, reward_config)
    _add_scorers(roles, judge, members)
    if beside is not None:
        _add_like_policy(roles, settings, beside)
    _train_policy_and_value(roles)
    _log_size(roles)
    return _configured(roles, settings)


def policy_roles(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    sft: Path,
    reward: Path | None,
    quantization: dict | None,
    members: Sequence[Path] = (),
) -> Roles:
    """As `ppo_roles`, without the role `value`: for methods without a value function."""
    base = load_causal_lm(settings.model, tokenizer, sft, quantization)
    roles = Roles(base, DTYPES[settings.model.dtype])
    _add_policy(roles, settings.lora)
    _add_scorers(roles, reward, members)
    roles.train_only("policy")
    _log_size(roles)
    return _configured(roles, settings)


def _add_scorers(roles: Roles, first: Path | None, members: Sequence[Path]) -> None:
    """Add reward models that nothing starts from: `reward`, if it is given, and its `members` beside it."""
    if first is not None:
        _add_reward(roles, first)
    for number, folder in enumerate(members, 1):
        _add_reward(roles, folder, f"reward_{number}")


def _add_policy(roles: Roles, lora: LoraSettings) -> None:
    """Add the role `policy`: an adapter on the base, or a trainable copy of it."""
    if lora.r == 0:
        roles.add_trunk("policy", roles.copy_trunk("reference"))
        roles.table["policy"] = Role("policy", None)
    else:
        roles.add_adapter("base", "policy", lora_config(lora, roles.trunk("reference")))
        roles.table["policy"] = Role("base", "policy")


def add_policy_and_value(roles: Roles, settings: Settings, reward: LoraConfig | None) -> None:
    """Add the roles `policy` and `value` (but for `ppo.value_model=none`), and train only these.

    `reward` is the adapter of the role `reward`, if there is that role and it is one.
    """
    # 1. The policy.
    _add_policy(roles, settings.lora)

    # 2. The value function is a head on the policy, an adapter, or a trunk of its own.
    if settings.ppo.value_model == "none":
        pass
    elif settings.ppo.value_model == "trunk_head":
        roles.table["value"] = roles.table["policy"]
    elif settings.lora.r == 0 or settings.ppo.value_model == "full":
        roles.add_trunk("value", roles.copy_trunk("reward" if "reward" in roles.table else "reference"))
        roles.table["value"] = Role("value", None)
    else:
        _add_value_adapter(roles, settings.lora, reward)
    if "value" in roles.table:
        roles.add_head("value", zero=True, bias=settings.ppo.value_bias)
    _train_policy_and_value(roles)


def _train_policy_and_value(roles: Roles) -> None:
    roles.train_only(*(role for role in ("policy", "value") if role in roles.table))


def _add_like_policy(roles: Roles, settings: Settings, role: str) -> None:
    """Add a role that computes what the policy does: an adapter on the same trunk, or a whole model."""
    if settings.lora.r == 0:
        roles.add_trunk(role, roles.copy_trunk("reference"))
        roles.table[role] = Role(role, None)
        return
    with torch.random.fork_rng():  # the random numbers that follow are those of a run without this role
        roles.add_adapter("base", role, lora_config(settings.lora, roles.trunk("reference")))
    roles.table[role] = Role("base", role)
    with torch.no_grad():
        for key, parameter in roles.parameters_of("policy").items():
            roles.parameters_of(role)[key].copy_(parameter)


def _log_size(roles: Roles) -> None:
    num_bytes = sum(p.numel() * p.element_size() for p in roles.parameters())
    trained = sum(p.numel() for p in roles.parameters() if p.requires_grad)
    log.info(
        "%d model(s) in memory (%s), %.1f MiB of weights, %s trainable parameters",
        len(roles.trunks), ", ".join(roles.trunks), num_bytes / 2**20, f"{trained:,}",
    )  # fmt: skip


def load_policy(roles: Roles, settings: Settings, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Give the role `policy` the weights in `folder`, which a run of the same `settings` has saved.

    Raises:
        ModelError: they cannot be read, or are those of another model.
    """
    trunk, adapter = roles.table["policy"]
    if adapter is None:
        model = load_causal_lm(settings.model, tokenizer, folder, dtype=torch.float32)
        stored, found = model.state_dict(), roles.trunk("policy").state_dict()
    else:
        stored, found = adapter_tensors(folder), dict(roles.adapter_parameters(trunk, adapter))
    shapes, expected = ({key: value.shape for key, value in tensors.items()} for tensors in (stored, found))
    if shapes != expected:
        differing = sorted(key for key in shapes.keys() | expected.keys() if shapes.get(key) != expected.get(key))
        raise ModelError(f"{folder}: the policy was made for another model: {differing[0]} does not fit")
    with torch.no_grad():
        for key, parameter in found.items():
            parameter.copy_(stored[key])


def _configured(roles: Roles, settings: Settings) -> Roles:
    """Apply `model.gradient_checkpointing` and `model.compile`."""
    if settings.model.gradient_checkpointing:
        roles.checkpoint_activations()
    if settings.model.compile:
        roles.compile_blocks()
    return roles


def reward_alone(
    model: ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    base: Path | None,
    quantization: dict | None,
) -> Roles:
    """The role `reward` by itself: a whole model, or an adapter on the model of the folder `base`."""
    if (folder / ADAPTER).exists():
        roles = Roles(load_causal_lm(model, tokenizer, base, quantization), DTYPES[model.dtype])
        _add_reward(roles, folder)
    else:
        roles = Roles(_classifier(folder, DTYPES[model.dtype]), DTYPES[model.dtype])
        roles.table["reward"] = Role("base", None)
        _add_reward_head(roles, folder)
    roles.train_only()
    return roles.eval()


def _add_reward(roles: Roles, folder: Path, role: str = "reward") -> LoraConfig | None:
    """Add a role from a reward model's folder; return the adapter's config, None for a full model."""
    config = None
    if (folder / ADAPTER).exists():
        config = load_adapter(roles, "base", role, folder)
        roles.table[role] = Role("base", role)
    else:
        roles.add_trunk(role, _classifier(folder, next(roles.trunk("reference").parameters()).dtype))
        roles.table[role] = Role(role, None)
    _add_reward_head(roles, folder, role)
    return config


def _classifier(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    options = {"num_labels": 1, "dtype": dtype, "use_safetensors": True}
    model = load_whole(AutoModelForSequenceClassification, folder, "reward model", **options)
    switch_off_dropout(model)
    return model.eval()


def _add_reward_head(roles: Roles, folder: Path, role: str = "reward") -> None:
    head = roles.add_head(role, zero=False)
    with torch.no_grad():
        head.weight.copy_(saved_head(folder))


def _add_value_adapter(roles: Roles, lora: LoraSettings, reward: LoraConfig | None) -> None:
    """Add the role `value` as an adapter that computes the same function as the reward adapter, if there is one.

    Its rank is at least that of the reward adapter, whose matrices fill its first ranks. The remaining ranks add
    nothing until they are trained, because their B is 0. It is on the same layers, and has DoRA's magnitudes if that
    has them. Without a reward adapter it is a new LoRA, on the reward model's trunk if there is one.
    """
    trunk = roles.table["reward"].trunk if "reward" in roles.table else "base"
    if reward is None:
        roles.add_adapter(trunk, "value", lora_config(lora, roles.trunks[trunk]))
        roles.table["value"] = Role(trunk, "value")
        return
    rank = max(lora.r, reward.r)
    scale = lora.scale
    config = LoraConfig(
        r=rank,
        lora_alpha=scale * rank,
        lora_dropout=lora.dropout,
        target_modules=sorted(reward.target_modules or []),
        layers_to_transform=reward.layers_to_transform,
        use_dora=reward.use_dora,
    )
    roles.add_adapter(trunk, "value", config)
    roles.table["value"] = Role(trunk, "value")
    source = roles.adapter_parameters(trunk, "reward")
    with torch.no_grad():
        for key, parameter in roles.adapter_parameters(trunk, "value").items():
            if "lora_A" in key:
                parameter[: reward.r] = source[key]
            elif "lora_B" in key:
                # The two adapters multiply B A by different scales.
                own = reward.lora_alpha / (math.sqrt(reward.r) if reward.use_rslora else reward.r)
                parameter[:, : reward.r] = source[key] * (own / scale)
            else:
                parameter.copy_(source[key])
