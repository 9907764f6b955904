"""SFT and reward stages on tiny models, and random rows to train them on."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from rlhf.data.records import Comparison, Demonstration
from rlhf.models.assembly import reward_roles, sft_roles
from rlhf.seeding import generator
from rlhf.settings import LoraSettings, RewardSettings, SFTSettings
from rlhf.stages.reward import RewardModeling
from rlhf.stages.sft import SupervisedFineTuning
from tests.helpers.ppo_stages import ppo_settings

NO_CLIPPING = 1e9


def words(seed: int, length: int) -> str:
    return " ".join(f"w{i}" for i in torch.randint(3, 50, (length,), generator=generator(seed, "words")).tolist())


DEMONSTRATIONS = [Demonstration(words(i, 1 + i % 5), words(100 + i, 1 + (5 * i) % 11)) for i in range(12)]

COMPARISONS = [
    Comparison(words(i, 1 + i % 4), words(200 + i, 1 + (3 * i) % 8), words(300 + i, 2 + (5 * i) % 7)) for i in range(10)
]

FULL = LoraSettings(r=0)


def sft_stage(folders: SimpleNamespace, lora: LoraSettings = FULL, **options: Any) -> SupervisedFineTuning:
    config = {"epochs": 1, "batch_size": 12, "max_length": 48, "lr": 1e-3, "max_grad_norm": NO_CLIPPING, **options}
    settings = replace(ppo_settings(), sft=SFTSettings(lora=lora, **config))
    settings.model.name_or_path = str(folders.sft)
    return SupervisedFineTuning(settings.sft, sft_roles(settings, folders.tokenizer, None), folders.tokenizer, 1)


def reward_stage(folders: SimpleNamespace, lora: LoraSettings = FULL, **options: Any) -> RewardModeling:
    config = {"epochs": 1, "batch_size": 10, "max_length": 48, "lr": 1e-3, "max_grad_norm": NO_CLIPPING, **options}
    settings = replace(ppo_settings(), reward=RewardSettings(lora=lora, **config))
    torch.manual_seed(0)
    roles = reward_roles(settings, folders.tokenizer, folders.sft, None)
    return RewardModeling(settings.reward, roles, folders.tokenizer, 1)
