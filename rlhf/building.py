"""Builds the stages that runs share, each into a folder of the cache: the SFT model and the reward model."""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rlhf import cache, tracking
from rlhf.data.records import RECORDS, DataError, DataSource, Split
from rlhf.guards import Guards
from rlhf.models.assembly import lora_config, reward_roles, sft_roles
from rlhf.models.export import HEAD, load_adapter, save_adapter, save_model
from rlhf.models.loading import DTYPES, load_causal_lm, load_tokenizer
from rlhf.models.roles import Roles
from rlhf.settings import RewardSettings, Settings, SFTSettings
from rlhf.stages.reward import RewardModeling
from rlhf.stages.sft import SupervisedFineTuning
from rlhf.training import MakeTrainer, train_supervised

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Builder:
    """What building takes: the settings, the same as plain values, the data, how the base is held, a trainer."""

    settings: Settings
    plain: dict[str, Any]
    source: DataSource
    quantization: dict[str, Any] | None
    make_trainer: MakeTrainer

    def sft(self, folder: Path) -> None:
        """The SFT model: `model/`, whole."""
        started, settings = time.time(), self.settings.sft
        log.info("training the SFT model (%s)", cache.name_of(folder))
        lightning.seed_everything(settings.seed, verbose=False)
        tokenizer = load_tokenizer(self.settings.model, self.source)
        roles = sft_roles(self.settings, tokenizer, self.quantization)
        train, held_out = divided(self.source, "sft", "sft_validation", settings.validation_size)
        steps = steps_of(settings, len(train))
        stage = SupervisedFineTuning(settings, roles, tokenizer, steps)
        stage.guards = Guards(self.settings.guards, folder)
        metrics = train_supervised(
            self.make_trainer, stage, settings, stage.encode(train), stage.encode(held_out), folder
        )
        dtype = DTYPES[self.settings.model.dtype]
        if self.quantization and settings.lora.r:
            # merge into the full-precision weights, not into the rounded ones
            save_adapter(roles, "policy", lora_config(settings.lora), folder, tokenizer, folder / "adapter")
            roles = Roles(load_causal_lm(self.settings.model, tokenizer))
            load_adapter(roles, "base", "policy", folder / "adapter")
            roles.table["policy"] = stage.roles.table["policy"]
        save_model(roles.copy_trunk("policy").to(dtype), tokenizer, folder / "model")
        told = {"rows": {"sft": len(train)}, "guards": stage.guards.summary()}
        tracking.write_summary(folder, metrics, self.plain, started, stage="sft", **told)

    def reward(self, folder: Path, sft: Path) -> None:
        """The reward model on the SFT model of the folder `sft`: `model/`, an adapter or whole."""
        started, settings = time.time(), self.settings.reward
        log.info("training the reward model (%s)", cache.name_of(folder))
        lightning.seed_everything(settings.seed, verbose=False)
        base = sft / "model"
        tokenizer = load_tokenizer(self.settings.model, self.source)
        roles = reward_roles(self.settings, tokenizer, base, self.quantization)
        train, held_out = divided(self.source, "preference", "preference_validation", settings.validation_size)
        steps = steps_of(settings, len(train))
        stage = RewardModeling(settings, roles, tokenizer, steps)
        stage.guards = Guards(self.settings.guards, folder)
        metrics = train_supervised(
            self.make_trainer, stage, settings, stage.encode(train), stage.encode(held_out), folder
        )
        demonstrations = records(self.source.load("sft").select(range(settings.centre_on)), "sft")
        metrics["reward/baseline"] = stage.baseline(demonstrations)
        if settings.lora.r:
            save_adapter(roles, "reward", lora_config(settings.lora), base, tokenizer, folder / "model")
        else:
            _save_full_reward(roles, tokenizer, base, folder / "model")
        told = {"rows": {"preference": len(train)}, "guards": stage.guards.summary()}
        tracking.write_summary(folder, metrics, self.plain, started, stage="reward", **told)


def _save_full_reward(roles: Roles, tokenizer: PreTrainedTokenizerBase, base: Path, folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.base_model.load_state_dict(roles.trunk("reward").base_model.state_dict())
    model.score.weight.data = roles.heads["reward"].weight.data.to(model.dtype)
    save_model(model, tokenizer, folder)
    from safetensors.torch import save_file

    # the float32 head, not its copy in the model's dtype
    save_file({"score.weight": roles.heads["reward"].state_dict()["weight"].cpu()}, folder / HEAD)


def divided(source: DataSource, split: Split, held_out: Split, size: int) -> tuple[list, list]:
    """Training and held-out rows: the data set's own validation split, or the end of the training split.

    Raises:
        DataError: there are too few rows.
    """
    rows = source.load(split)
    if held_out in source.splits:
        other = source.load(held_out)
        return records(rows, split), records(other.select(range(min(size, len(other)))), held_out)
    if len(rows) <= size:
        raise DataError(f"the split {split} has {len(rows)} rows, too few to hold out {size}")
    everything = records(rows.shuffle(seed=0), split)
    return everything[:-size], everything[-size:]


def records(rows: Dataset, split: Split) -> list:
    """The rows as records of their split."""
    return [RECORDS[split](**row) for row in rows]


def steps_of(settings: SFTSettings | RewardSettings, rows: int) -> int:
    """Optimiser steps of a supervised stage: its epochs over the rows, or fewer."""
    steps = math.ceil(settings.epochs * rows / settings.batch_size)
    return min(steps, settings.max_steps or steps)
