"""A model of the zoo through SFT, reward model and PPO, a step of each, saved as runs save it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf import ppo
from rlhf.data.chat_template import ChatTemplate
from rlhf.data.records import Comparison, Demonstration
from rlhf.models.assembly import lora_config, ppo_roles, reward_roles, sft_roles
from rlhf.models.export import save_adapter, save_model
from rlhf.models.loading import load_tokenizer
from rlhf.models.roles import Roles
from rlhf.pipeline.builders.reward import save_full_reward
from rlhf.schema import ALL_LINEAR
from rlhf.scorers import Context
from rlhf.scorers.reward_model import RewardModelScorer
from rlhf.settings import LoraSettings, ModelSettings, RewardSettings, Settings, SFTSettings
from rlhf.stages.batches import SeededBatches
from rlhf.stages.ppo import PPO, make_ppo
from rlhf.stages.reward import RewardModeling
from rlhf.stages.sft import SupervisedFineTuning
from tests.helpers.ppo_stages import no_metrics, ppo_settings
from tests.helpers.scorer_context import NoSource
from tests.helpers.training import fit
from tests.helpers.zoo import ZOO, save_animal

ADAPTERS = LoraSettings(r=4, alpha=16.0, target_modules=ALL_LINEAR)
WHOLE = LoraSettings(r=0)
QUESTIONS = ["Hi", "Add 1 and 2, please.", "Why is the sky blue?", "Name a café in Zürich."]
ANSWERS = ["Hello!", "3", "Because air scatters short waves more than long ones.", "Odeon."]
SFT = {"epochs": 1, "batch_size": 4, "max_length": 150, "lr": 1e-2}


@dataclass
class Trained:
    """What the stages left: folders of the SFT model, the reward model and the policy, PPO's stage and its metrics."""

    tokenizer: PreTrainedTokenizerBase
    sft: Path
    reward: Path
    policy: Path
    stage: PPO
    metrics: dict[str, float]

    @property
    def roles(self) -> Roles:
        return self.stage.roles


def train_animal(name: str, lora: LoraSettings, folder: Path) -> Trained:
    """Train a model of the zoo with `lora` in all stages; with adapters where it has no classifier."""
    # 1. Model, tokenizer and prompts.
    reward = lora if ZOO[name].classifier else ADAPTERS
    settings = zoo_settings(save_animal(name, folder / "base"), lora, reward, ZOO[name].engine)
    own = ChatTemplate(str(folder / "base")) if has_template(folder / "base") else None
    tokenizer = load_tokenizer(settings.model, NoSource(own))
    prompts = [own.render(question) if own else question for question in QUESTIONS]
    # 2. The stages, as the pipeline runs them.
    sft = train_sft(settings, tokenizer, prompts, folder / "sft")
    judge = train_reward(settings, tokenizer, prompts, sft, folder / "reward")
    torch.manual_seed(0)
    roles = ppo_roles(settings, tokenizer, sft, judge, None)
    scorer = RewardModelScorer(Context(NoSource(), tokenizer, roles, reward_baseline=0.0))
    stage = make_ppo(settings, roles, tokenizer, scorer, ppo.FixedKL(0.05), no_metrics, folder / "samples")
    metrics = fit(stage, prompts, SeededBatches(len(prompts), 4, 0, 1), folder / "ppo")[-1]
    roles.eval()
    # 3. The policy.
    policy = folder / "policy"
    if lora.r:
        save_adapter(roles, "policy", lora_config(lora, roles.trunk("policy")), sft, tokenizer, policy)
    else:
        save_model(roles.trunk("policy"), tokenizer, policy)
    return Trained(tokenizer, sft, judge, policy, stage, metrics)


def has_template(folder: Path) -> bool:
    return (folder / "chat_template.jinja").exists()


def zoo_settings(base: Path, lora: LoraSettings, reward: LoraSettings, engine: str) -> Settings:
    """A step of each stage, with rates at which a step shows."""
    options = {"steps": 1, "rollout_batch_size": 4, "minibatch_size": 2, "epochs": 1, "warmup_steps": 0}
    settings = ppo_settings(lora=lora, microbatch_tokens=200, **options)
    return replace(
        settings,
        model=ModelSettings("animal", str(base), max_prompt_tokens=150),
        sft=SFTSettings(lora=lora, **SFT),
        reward=RewardSettings(lora=reward, **SFT),
        generation=replace(settings.generation, engine=engine, max_new_tokens=12, temperature=1.0),
    )


def train_sft(settings: Settings, tokenizer: PreTrainedTokenizerBase, prompts: list[str], folder: Path) -> Path:
    torch.manual_seed(0)
    stage = SupervisedFineTuning(settings.sft, sft_roles(settings, tokenizer, None), tokenizer, 1)
    rows = [Demonstration(prompt, answer) for prompt, answer in zip(prompts, ANSWERS, strict=True)]
    one_step(stage, rows, folder / "log")
    save_model(stage.roles.copy_trunk("policy"), tokenizer, folder / "model")
    return folder / "model"


def train_reward(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, prompts: list[str], sft: Path, folder: Path
) -> Path:
    torch.manual_seed(0)
    roles = reward_roles(settings, tokenizer, sft, None)
    stage = RewardModeling(settings.reward, roles, tokenizer, 1)
    rows = [Comparison(*row) for row in zip(prompts, ANSWERS, reversed(ANSWERS), strict=True)]
    one_step(stage, rows, folder / "log")
    if settings.reward.lora.r:
        config = lora_config(settings.reward.lora, roles.trunk("reward"))
        save_adapter(roles, "reward", config, sft, tokenizer, folder / "model")
    else:
        save_full_reward(roles, tokenizer, sft, folder / "model")
    return folder / "model"


def one_step(stage: Any, rows: list[Any], folder: Path) -> None:
    fit(stage, stage.encode(rows), SeededBatches(len(rows), len(rows), 0, 1), folder)
    stage.roles.eval()
