"""DPO stages on tiny models, put together as rlhf.pipeline.methods does."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import DataLoader

from rlhf.data.records import Prompt
from rlhf.models.assembly import policy_roles
from rlhf.pipeline.train_policy import train_policy
from rlhf.policy_settings import DPOSettings
from rlhf.scorers import Context
from rlhf.scorers.text import FunctionScorer
from rlhf.settings import LoraSettings
from rlhf.stages.dpo import DPO
from tests.helpers.ppo_stages import LORA, PROMPTS, count_low_words, ppo_settings
from tests.helpers.scorer_context import NoSource
from tests.helpers.supervised_stages import COMPARISONS
from tests.helpers.training import quiet_trainer

OPTIONS: dict[str, Any] = {
    "steps": 4, "batch_size": 6, "max_length": 48, "lr": 1e-2, "lr_full": 1e-3, "eval_every": 100, "log_every": 1,
    "checkpoint_every": 100, "microbatch_tokens": 60, "beta": 0.1, "max_grad_norm": 1e9,
}  # fmt: skip


def no_metrics(prompts: Sequence[Any], responses: Sequence[str]) -> tuple[dict, list[dict]]:
    return {}, [{} for _ in responses]


def dpo_stage(
    folders: SimpleNamespace, samples: Path, lora: LoraSettings = LORA, reward: bool = False, **options: Any
) -> DPO:
    """A stage on the tiny SFT model, as it is before its first step."""
    settings = replace(ppo_settings(lora=lora), dpo=DPOSettings(**{**OPTIONS, **options}))
    torch.manual_seed(0)
    roles = policy_roles(settings, folders.tokenizer, folders.sft, folders.reward if reward else None, None)
    scorer = FunctionScorer(
        Context(NoSource(), folders.tokenizer, roles), f"{count_low_words.__module__}.count_low_words"
    )
    stage = DPO(settings, roles, folders.tokenizer, scorer, no_metrics, samples)
    stage.held_out = stage.encode(COMPARISONS[8:])
    return stage


def train_dpo(stage: DPO, folder: Path, **options: Any) -> dict[str, float]:
    """`train_policy` on eight comparisons; returns the evaluation of step 0."""
    folder.mkdir(exist_ok=True)
    evaluation: DataLoader = DataLoader([Prompt(p, "w5") for p in PROMPTS[:4]], batch_size=4, collate_fn=list)  # type: ignore[arg-type]
    return train_policy(quiet_trainer, stage, stage.encode(COMPARISONS[:8]), evaluation, folder, "auto", **options)
