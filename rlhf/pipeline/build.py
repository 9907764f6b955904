"""Builds what runs share, each into a folder of the cache: SFT model, comparisons of its answers, reward model."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rlhf.data.options import parse_template
from rlhf.data.records import DataSource, divided, records, skipped_rows
from rlhf.data.templates import Template
from rlhf.distributed import collectives
from rlhf.evaluation.evaluate import Judge
from rlhf.evaluation.preferences import FromData, SavedPreferences, Simulated
from rlhf.files import METRICS, MODEL
from rlhf.guards import Guards
from rlhf.models.assembly import lora_config, reward_roles, sft_roles
from rlhf.models.export import HEAD, load_adapter, save_adapter, save_model
from rlhf.models.loading import DTYPES, load_causal_lm, load_tokenizer
from rlhf.models.roles import Roles
from rlhf.models.sharding import gathered
from rlhf.models.tokenizing import short_enough
from rlhf.pipeline import cache
from rlhf.pipeline.config import instantiate
from rlhf.pipeline.train import MakeTrainer, train_supervised
from rlhf.rollout.factory import make_engine
from rlhf.rollout.sample import Rollouts, rollout
from rlhf.scorers import Context
from rlhf.seeding import generator
from rlhf.settings import RewardSettings, Settings, SFTSettings
from rlhf.stages.cutting import count_short, distinct
from rlhf.stages.reward import RewardModeling, longer_accuracy
from rlhf.stages.sft import SupervisedFineTuning
from rlhf.tracking.metrics_file import JsonLines
from rlhf.tracking.summary import write_summary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Builder:
    """What building takes: the settings, the same as plain values, the data, how the base is held, a trainer.

    `place` tries models out and puts them where they will train.
    """

    settings: Settings
    plain: dict[str, Any]
    source: DataSource
    quantization: dict[str, Any] | None
    make_trainer: MakeTrainer
    place: Callable[[Roles, bool], None]

    def sft(self, folder: Path) -> None:
        """The SFT model: `model/`, whole."""
        started, settings = time.monotonic(), self.settings.sft
        log.info("training the SFT model (%s)", cache.name_of(folder))
        lightning.seed_everything(settings.seed, verbose=False)
        tokenizer = load_tokenizer(self.settings.model, self.source)
        roles = sft_roles(self.settings, tokenizer, self.quantization)
        self.place(roles, settings.packing)
        train, held_out = divided(self.source, "sft", "sft_validation", settings.validation_size)
        steps = steps_of(settings, len(train))
        stage = SupervisedFineTuning(settings, roles, tokenizer, steps)
        stage.guards = Guards(self.settings.guards, folder)
        texts = stage.encode(train)
        limit = f"sft.max_length={settings.max_length}"
        short = count_short(texts, settings.max_length, tokenizer.eos_token_id, "sft", limit)
        metrics = train_supervised(self.make_trainer, stage, settings, texts, stage.encode(held_out), folder)
        whole = gathered(roles) if roles.sharded else None
        collectives.on_rank_zero(lambda: self._save_sft(roles, whole, tokenizer, folder))
        skipped = skipped_rows(self.source, "sft")
        told = {"rows": {"sft": len(train)}, "skipped": skipped, "cut": short, "guards": stage.guards.summary()}
        write_summary(folder, metrics, self.plain, started, stage="sft", **told)

    def _save_sft(
        self, roles: Roles, whole: dict[str, Tensor] | None, tokenizer: PreTrainedTokenizerBase, folder: Path
    ) -> None:
        """`model/`, with the adapter merged in; `whole` are the weights of a base that the processes share out."""
        lora = self.settings.sft.lora
        if whole or (self.quantization and lora.r):
            # merge into the full-precision weights, not into the rounded ones, and into all of them, not into a share
            save_adapter(roles, "policy", lora_config(lora), folder, tokenizer, folder / "adapter")
            plain = Roles(load_causal_lm(self.settings.model, tokenizer))
            if whole:
                plain.trunk("reference").load_state_dict(whole)
            load_adapter(plain, "base", "policy", folder / "adapter")
            plain.table["policy"] = roles.table["policy"]
            roles = plain
        merged = roles.copy_trunk("policy").to(DTYPES[self.settings.model.dtype])
        save_model(merged, tokenizer, folder / MODEL)

    @cached_property
    def comparisons(self) -> FromData | Simulated:
        """Where the comparisons for the reward model come from."""
        return instantiate(self.plain["preferences"], "preferences", _recursive_=False)

    def prepare_preferences(self) -> None:
        """See whether comparisons can be simulated, as far as that shows before anything is built.

        Raises:
            ConfigError: the annotator lacks something.
            DataError: there are too few prompts.
        """
        self._simulated.prepare(self.source, self.template)

    def preferences(self, folder: Path, sft: Path, device: str) -> None:
        """Comparisons of the answers of the SFT model of the folder `sft`: `preference.jsonl` and what is held out.

        The first process makes them for all.
        """
        collectives.on_rank_zero(lambda: self._simulate(folder, sft, device))

    def _simulate(self, folder: Path, sft: Path, device: str) -> None:
        started, simulated = time.monotonic(), self._simulated
        log.info("simulating preferences (%s)", cache.name_of(folder))
        tokenizer = load_tokenizer(self.settings.model, self.source)
        base = load_causal_lm(self.settings.model, tokenizer, sft / MODEL, self.quantization)
        roles = Roles(base, DTYPES[self.settings.model.dtype]).eval().to(device)
        generation = replace(self.settings.generation, capture_logprobs="never")
        engine = make_engine(generation, tokenizer, roles)
        limit = self.settings.model.max_prompt_tokens
        questions = {
            split: [rows[i] for i in short_enough(tokenizer, [row.prompt for row in rows], limit)]
            for split, rows in simulated.questions(self.source, self.template).items()
        }

        def answer(prompts: list[str], part: int) -> Rollouts:
            stream = generator(simulated.settings.seed, "preferences", part, device)
            return rollout(engine, roles, "reference", tokenizer, prompts, generation, stream,
                           simulated.settings.temperature, simulated.settings.max_new_tokens)  # fmt: skip

        def hire() -> Judge:
            budget = self.settings.reward.microbatch_tokens
            context = Context(self.source, tokenizer, roles, microbatch_tokens=budget, cache=folder.parent)
            return instantiate(simulated.judge, "preferences.judge", context)

        metrics = simulated.make(folder, questions, answer, hire)
        (folder / METRICS).unlink(missing_ok=True)
        JsonLines(folder).log_metrics(metrics, 0)
        write_summary(folder, metrics, self.plain, started, stage="preferences", sft_model=sft.name)

    @property
    def _simulated(self) -> Simulated:
        assert isinstance(self.comparisons, Simulated)
        return self.comparisons

    @property
    def template(self) -> Template | None:
        """What turns an instruction into a prompt, if the data set has one."""
        template = self.plain["data"].get("template")
        return parse_template(template) if template else None

    def reward(self, folder: Path, sft: Path, preferences: Path | None = None) -> None:
        """The reward model on the SFT model of the folder `sft`: `model/`, an adapter or whole.

        It learns from the simulated `preferences`, or else from those of the data set.
        """
        started, settings = time.monotonic(), self.settings.reward
        log.info("training the reward model (%s)", cache.name_of(folder))
        lightning.seed_everything(settings.seed, verbose=False)
        base = sft / MODEL
        tokenizer = load_tokenizer(self.settings.model, self.source)
        roles = reward_roles(self.settings, tokenizer, base, self.quantization)
        self.place(roles, False)
        source = SavedPreferences(preferences) if preferences else self.source
        train, held_out = divided(source, "preference", "preference_validation", settings.validation_size)
        stage = RewardModeling(settings, roles, tokenizer, steps_of(settings, len(train)))
        stage.guards = Guards(self.settings.guards, folder)
        limit = f"reward.max_length={settings.max_length}"
        train, pairs, equal = distinct(train, stage.encode(train), "preference", limit)
        held_out, measured, _ = distinct(held_out, stage.encode(held_out), "preference, held out", limit)
        texts = [text for pair in pairs for text in pair]
        short = count_short(texts, settings.max_length, tokenizer.eos_token_id, "preference", limit)
        stage.total_steps = steps_of(settings, len(train))
        metrics = train_supervised(self.make_trainer, stage, settings, pairs, measured, folder)
        demonstrations = records(self.source.load("sft").select(range(settings.baseline_rows)), "sft")
        metrics["reward/baseline"] = stage.baseline(demonstrations)
        metrics["reward/longer_accuracy"] = longer_accuracy(held_out)
        log.info("right on %.1f %% of %d held-out comparisons, where the longer answer is on %.1f %%",
                 100 * metrics["reward/accuracy"], len(held_out), 100 * metrics["reward/longer_accuracy"])  # fmt: skip
        if settings.lora.r:
            adapter = (roles, "reward", lora_config(settings.lora), base, tokenizer, folder / MODEL)
            collectives.on_rank_zero(lambda: save_adapter(*adapter))
        else:
            collectives.on_rank_zero(lambda: save_full_reward(roles, tokenizer, base, folder / MODEL))
        told = {
            "rows": {"preference": len(train)},
            "skipped": skipped_rows(source, "preference") | equal,
            "cut": short,
            "guards": stage.guards.summary(),
        }
        learned = {"preferences": preferences.name} if preferences else {}
        write_summary(folder, metrics, self.plain, started, stage="reward", **told, **learned)


def save_full_reward(roles: Roles, tokenizer: PreTrainedTokenizerBase, base: Path, folder: Path) -> None:
    """A whole reward model, as transformers' sequence classifier on the architecture of the model at `base`."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.base_model.load_state_dict(roles.trunk("reward").base_model.state_dict())
    model.score.weight.data = roles.heads["reward"].weight.data.to(model.dtype)
    save_model(model, tokenizer, folder)
    from safetensors.torch import save_file

    # the float32 head, not its copy in the model's dtype
    save_file({"score.weight": roles.heads["reward"].state_dict()["weight"].cpu()}, folder / HEAD)


def steps_of(settings: SFTSettings | RewardSettings, rows: int) -> int:
    """Optimiser steps of a supervised stage: its epochs over the rows, or fewer."""
    steps = math.ceil(settings.epochs * rows / settings.batch_size)
    return min(steps, settings.max_steps or steps)
