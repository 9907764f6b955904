"""PPO stages on tiny models, put together as rlhf.pipeline.run does, with settings for a few steps."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf import ppo
from rlhf.models.assembly import ppo_roles
from rlhf.policy_settings import DivergenceSettings
from rlhf.scorers import Context
from rlhf.scorers.text import FunctionScorer
from rlhf.settings import EvaluationSettings, GenerationSettings, LoraSettings, ModelSettings, PPOSettings, Settings
from rlhf.stages import ppo as ppo_stage
from rlhf.stages.batches import SeededBatches
from rlhf.stages.ppo import PPO
from tests.helpers.composed_config import composed_settings
from tests.helpers.scorer_context import NoSource
from tests.helpers.training import fit

PROMPTS = [" ".join(f"w{3 + (7 * i + j) % 40}" for j in range(1 + i % 5)) for i in range(24)]
LORA = LoraSettings(r=4, alpha=8.0, dropout=0.0, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])


def count_low_words(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A scorer that a policy can learn from: the share of words below w20 in each response."""
    words = [response.split() or ["w49"] for response in responses]
    return [sum(int(word.strip("<>w") or 49) < 20 for word in row if word[0] == "w") / len(row) for row in words]


def ppo_settings(divergence: str = "kl", kind: str = "logprobs", lora: LoraSettings = LORA, **options: Any) -> Settings:
    config = {
        "steps": 2, "rollout_batch_size": 12, "minibatch_size": 6, "epochs": 2, "lr": 1e-2, "lr_full": 1e-2,
        "warmup_steps": 1, "eval_every": 100, "checkpoint_every": 100, "microbatch_tokens": 60, "adam_eps": 1e-5,
    }  # fmt: skip
    return Settings(
        seed=3,
        model=ModelSettings(name="tiny", max_prompt_tokens=32),
        lora=lora,
        ppo=PPOSettings(**{**config, **options}),
        divergence=DivergenceSettings(divergence, f"rlhf.divergence.{divergence}", kind),
        generation=GenerationSettings(max_new_tokens=16, temperature=0.9, batch_size=8),
        evaluation=EvaluationSettings(max_new_tokens=8, prompts=4, kl_prompts=2),
    )


def with_advantages(settings: Settings, option: str) -> Settings:
    """The settings as `advantages=<option>` changes them."""
    chosen, plain = composed_settings(f"advantages={option}"), composed_settings()
    changed = {
        item.name: getattr(chosen.ppo, item.name)
        for item in fields(PPOSettings)
        if getattr(chosen.ppo, item.name) != getattr(plain.ppo, item.name)
    }
    samples = chosen.generation.samples_per_prompt
    return replace(
        settings,
        advantages=chosen.advantages,
        ppo=replace(settings.ppo, **changed),
        generation=replace(settings.generation, samples_per_prompt=samples),
    )


def no_metrics(prompts: Sequence[Any], responses: Sequence[str]) -> tuple[dict, list[dict]]:
    return {}, [{} for _ in responses]


def make_ppo(
    settings: Settings,
    folders: SimpleNamespace,
    samples: Path,
    reward: bool = True,
    warm: bool = True,
    kl: Any = None,
    rule: Any = None,
) -> PPO:
    """Make a PPO stage as rlhf.pipeline.run does; with `warm`, the policy starts from a non-zero adapter."""
    tokenizer = folders.tokenizer
    torch.manual_seed(0)
    beside = rule.role if rule else None
    roles = ppo_roles(settings, tokenizer, folders.sft, folders.reward if reward else None, None, beside=beside)
    if warm and settings.lora.r:
        for key, parameter in roles.adapter_parameters("base", "policy").items():
            parameter.data.copy_(folders.policy[key])
    scorer = FunctionScorer(Context(NoSource(), tokenizer, roles), f"{__name__}.count_low_words")
    kl = kl or ppo.FixedKL(0.05)
    return ppo_stage.make_ppo(settings, roles, tokenizer, scorer, kl, no_metrics, samples, rule)


def train(stage: PPO, folder: Path, start: int = 0, **options: Any) -> list[dict[str, float]]:
    batches = SeededBatches(len(PROMPTS), stage.prompts_per_step, stage.config.seed, stage.ppo.steps, start)
    return fit(stage, PROMPTS, batches, folder, **options)


def remove_reward_signal(experience: Any) -> None:
    """Set advantages to 0 and returns to the old values, so that only a divergence in the loss has a gradient."""
    experience.advantages = torch.zeros_like(experience.advantages)
    experience.returns = experience.old_values


def take_advantages_away(monkeypatch: pytest.MonkeyPatch, stage: PPO) -> None:
    """Set all advantages to 0, so that only other terms of the loss move the policy."""
    make_experience = stage.make_experience

    def without_advantages(*args: Any) -> Any:
        experience = make_experience(*args)
        experience.advantages = torch.zeros_like(experience.advantages)
        return experience

    monkeypatch.setattr(stage, "make_experience", without_advantages)
