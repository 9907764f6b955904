"""Average the weights of several reward models into one (WARM: Ramé et al. 2024, arXiv 2401.12187).

What is averaged are the weights that the models compute with. Those of an adapter are W + s B A, whose average over m
members is W + s (1/m) Σ Bᵢ Aᵢ. Averaging A and B separately would add the products Bᵢ Aⱼ of different members, which no
member has trained. The average of products is itself an adapter, of m times the rank: the members' A below each other,
and their B beside each other, divided by m.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rlhf.errors import ConfigError
from rlhf.errors.machine import writing
from rlhf.files import ADAPTER_CONFIG
from rlhf.models.export import ADAPTER, HEAD, PREFIX, adapter_tensors, save_model, save_tokenizer, saved_head
from rlhf.models.loading import load_whole


def average_reward_models(members: Sequence[Path], tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the average of the reward models in the folders `members`, all adapters or all whole, into `folder`.

    Raises:
        ConfigError: they are adapters whose effect is not linear in B A.
    """
    folder.mkdir(parents=True, exist_ok=True)
    head = torch.stack([saved_head(member) for member in members]).mean(0)
    if (members[0] / ADAPTER).exists():
        _average_adapters(members, head, folder)
        save_tokenizer(tokenizer, folder, scoring=True)
    else:
        _average_models(members, head, tokenizer, folder)


def averaged_config(config: dict[str, Any], members: int) -> dict[str, Any]:
    """peft's settings of the averaged adapter from those of a member: more ranks at the same scale.

    Raises:
        ConfigError: the adapter also rescales the weights (DoRA), so that its effect is not linear in B A.
    """
    if config.get("use_dora"):
        raise ConfigError("reward.average_of: the effect of a DoRA adapter is no product B A; allowed: a plain LoRA")
    growth = math.sqrt(members) if config.get("use_rslora") else members  # the scale is alpha / √r, or alpha / r
    return {**config, "r": config["r"] * members, "lora_alpha": config["lora_alpha"] * growth}


def averaged_products(adapters: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The matrices A [m·r, in] and B [out, m·r] of the adapter whose product is the mean of the members' products."""
    return {
        key: torch.cat([own[key] for own in adapters], 0)
        if "lora_A" in key
        else torch.cat([own[key] / len(adapters) for own in adapters], 1)
        for key in adapters[0]
    }


def _average_adapters(members: Sequence[Path], head: Tensor, folder: Path) -> None:
    config = json.loads((members[0] / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    tensors = averaged_products([adapter_tensors(member) for member in members])
    named = {PREFIX + key: value.contiguous() for key, value in tensors.items()}
    with writing(folder / ADAPTER):
        save_file({**named, PREFIX + "score.weight": head}, folder / ADAPTER)
    settings = json.dumps(averaged_config(config, len(members)), indent=2)
    (folder / ADAPTER_CONFIG).write_text(settings, encoding="utf-8")


def _average_models(members: Sequence[Path], head: Tensor, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Whole models, of which two are in memory at a time."""
    model = load_whole(AutoModelForSequenceClassification, members[0], "reward model", num_labels=1)
    sums = {key: value.double() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    for member in members[1:]:
        other = load_whole(AutoModelForSequenceClassification, member, "reward model", num_labels=1)
        for key, value in other.state_dict().items():
            if value.is_floating_point():
                sums[key] += value
    averaged = {key: value / len(members) if value.is_floating_point() else value for key, value in sums.items()}
    model.load_state_dict(averaged)  # copies into the model's own dtype
    save_model(model, tokenizer, folder)
    save_file({"score.weight": head}, folder / HEAD)
