"""Stages put together as rlhf.pipeline.run does, run through a real trainer, and watched."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from rlhf import ppo
from rlhf.models.assembly import ppo_roles
from rlhf.models.roles import Roles
from rlhf.scorers import Context
from rlhf.scorers.text import FunctionScorer
from rlhf.settings import (
    DivergenceSettings,
    EvaluationSettings,
    GenerationSettings,
    LoraSettings,
    ModelSettings,
    PPOSettings,
    Settings,
)
from rlhf.stages import ppo as ppo_stage
from rlhf.stages.base import Stage
from rlhf.stages.batches import SeededBatches, loader
from rlhf.stages.ppo import PPO
from rlhf.tracking.metrics_file import JsonLines, read_metrics

PROMPTS = [" ".join(f"w{3 + (7 * i + j) % 40}" for j in range(1 + i % 5)) for i in range(24)]
LORA = LoraSettings(r=4, alpha=8.0, dropout=0.0, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])


class NoSource:
    """A data set that nobody reads."""

    splits = ()

    def load(self, split: str) -> Any:
        raise AssertionError


def count_low_words(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A score that a policy can raise: the share of words below w20."""
    words = [response.split() or ["w49"] for response in responses]
    return [sum(int(word.strip("<>w") or 49) < 20 for word in row if word[0] == "w") / len(row) for row in words]


def quiet_trainer(folder: Path, **options: Any) -> lightning.Trainer:
    """As the pipeline makes it, without bars."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return lightning.Trainer(
        accelerator="cpu", logger=[JsonLines(folder)], inference_mode=False, num_sanity_val_steps=0,
        **quiet, **options,
    )  # fmt: skip


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


def no_metrics(prompts: Sequence[Any], responses: Sequence[str]) -> tuple[dict, list[dict]]:
    return {}, [{} for _ in responses]


def make_ppo(
    settings: Settings, folders: SimpleNamespace, samples: Path, reward: bool = True, warm: bool = True, kl: Any = None
) -> PPO:
    """As rlhf.pipeline.run does; `warm` starts from an adapter that is no no-op."""
    tokenizer = folders.tokenizer
    torch.manual_seed(0)
    roles = ppo_roles(settings, tokenizer, folders.sft, folders.reward if reward else None, None)
    if warm and settings.lora.r:
        for key, parameter in roles.adapter_parameters("base", "policy").items():
            parameter.data.copy_(folders.policy[key])
    scorer = FunctionScorer(Context(NoSource(), tokenizer, roles), f"{__name__}.count_low_words")
    return ppo_stage.make_ppo(settings, roles, tokenizer, scorer, kl or ppo.FixedKL(0.05), no_metrics, samples)


def fit(stage: Stage, rows: Any, batches: SeededBatches, folder: Path, **options: Any) -> list[dict[str, float]]:
    """Train on the CPU; the metrics logged."""
    resume = {"ckpt_path": options.pop("ckpt_path"), "weights_only": True} if "ckpt_path" in options else {}
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=[JsonLines(folder)], enable_progress_bar=False, inference_mode=False,
        enable_model_summary=False, enable_checkpointing=False, **options,
    )  # fmt: skip
    trainer.fit(stage, loader(rows, getattr(stage, "collate", list), batches), **resume)
    return read_metrics(folder)


def train(stage: PPO, folder: Path, start: int = 0, **options: Any) -> list[dict[str, float]]:
    batches = SeededBatches(len(PROMPTS), stage.ppo.rollout_batch_size, stage.config.seed, stage.ppo.steps, start)
    return fit(stage, PROMPTS, batches, folder, **options)


@contextmanager
def gradients() -> Iterator[list[list[Tensor | None]]]:
    """The gradients that each optimiser step sees."""
    seen: list[list[Tensor | None]] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        seen.append([None if p.grad is None else p.grad.clone() for p in trained])

    handle = register_optimizer_step_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def spy(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[tuple, Any]]:
    """(arguments, result) of each call; the call itself is the real one."""
    real, calls = getattr(owner, name), []

    def call(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        calls.append((args, result))
        return result

    monkeypatch.setattr(owner, name, call)
    return calls


def weights(roles: Roles) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in roles.named_parameters()}


def changed(before: dict[str, Tensor], roles: Roles) -> set[str]:
    return {name for name, p in roles.named_parameters() if not torch.equal(before[name], p)}
