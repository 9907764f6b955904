"""Puts a run together: data, models, stage, trainer, evaluation. The only place that knows all of them."""

import logging
import math
import shutil
import time
from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import hydra
import lightning
import torch
from datasets import Dataset
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rlhf import cache, tracking
from rlhf.checkpoints import Best, StepCheckpoints
from rlhf.config import best_metric, instantiate, is_quantized, needs, target_class
from rlhf.dashboards import Dashboard
from rlhf.data.options import parse_template
from rlhf.data.records import RECORDS, DataError, DataSource, Prompt, Split
from rlhf.evaluation import alpaca_eval
from rlhf.evaluation.evaluate import Evaluation
from rlhf.evaluation.factscore import FactScore
from rlhf.files import BEST_MODEL
from rlhf.guards import Guards
from rlhf.interruption import Interruption
from rlhf.models.assembly import lora_config, ppo_roles, reward_roles, sft_roles
from rlhf.models.export import HEAD, load_adapter, save_adapter, save_model
from rlhf.models.loading import DTYPES, load_causal_lm, load_tokenizer
from rlhf.models.roles import Roles
from rlhf.rollout import encode, make_engine
from rlhf.scorers import Context
from rlhf.settings import RewardSettings, Settings, SFTSettings
from rlhf.stages.ppo import PPO
from rlhf.stages.reward import RewardModeling
from rlhf.stages.sft import SupervisedFineTuning
from rlhf.training import train_ppo, train_supervised

log = logging.getLogger(__name__)
SFT_CODE = ("data", "models", "settings.py", "rollout.py", "stages/base.py", "stages/sft.py")
REWARD_CODE = (*SFT_CODE, "stages/reward.py")
NOT_IDENTITY = ("name", "output_dir", "resume", "dry_run", "logger", "trainer", "report", "arm", "guards")


class Run:
    """One composed configuration on its way to results; `folder` is where Hydra put it."""

    def __init__(
        self,
        config: DictConfig,
        settings: Settings,
        source: DataSource,
        folder: Path,
        overrides: Sequence[str] = (),
        progress: bool = True,
    ):
        self.config, self.settings, self.source, self.folder = config, settings, source, folder
        self.overrides, self.progress = list(overrides), progress
        self.plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
        self.quantization = settings.quantization if is_quantized(settings.quantization) else None
        self.dashboard: Dashboard | None = None
        self.offline = False
        torch.set_float32_matmul_precision("high")

    # -- what is cached ----------------------------------------------------------------------------------------------

    @cached_property
    def sft_folder(self) -> Path:
        """Where the SFT model of this configuration is, or will be."""
        return self._cached("sft", {}, SFT_CODE)

    @cached_property
    def reward_folder(self) -> Path:
        """Where the reward model of this configuration is, or will be."""
        return self._cached("reward", {"sft_model": self.sft_folder.name}, REWARD_CODE)

    def _cached(self, stage: str, upstream: dict[str, Any], code: tuple[str, ...]) -> Path:
        keys = ("model", "data", "quantization", stage)
        name = cache.digest({**{key: self.plain[key] for key in keys}, **upstream}, code)
        return (self.outputs / "cache" / f"{stage}-{name}").resolve()

    @cached_property
    def identity(self) -> str:
        """A digest of the configuration and the models it starts from: two runs of one identity are the same run.

        PPO's own code is left out, so that a mended line does not throw away a week of runs; reports name commits.
        """
        chosen = {key: _without_clients(value) for key, value in self.plain.items() if key not in NOT_IDENTITY}
        return cache.digest({**chosen, "needed": [path.name for path in self.needed()]}, ())

    @property
    def outputs(self) -> Path:
        """Where all runs and the cache are."""
        return Path(self.plain["output_dir"])

    def finished(self) -> Path | None:
        """The folder of this very run, finished here or under another name."""
        summary = tracking.read_summary(self.folder)
        if summary is not None and summary.get("identity") == self.identity:
            return self.folder
        return cache.find_run(self.outputs, self.identity)

    def needed(self) -> list[Path]:
        """The cached folders that this run needs, in the order in which they are built."""
        stage = self.config.stage.name
        folders = [self.sft_folder]
        judged = stage in ("ppo", "evaluate")
        if stage == "reward" or (judged and self.needs_reward_model):
            folders.append(self.reward_folder)
        return folders

    @property
    def needs_reward_model(self) -> bool:
        """Whether the scorer or the judge reads a reward model."""
        return any(needs(self.config, key, "needs_reward_model") for key in ("scorer", "judge"))

    # -- the stages --------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Build what is missing, then the stage itself; returns the summary."""
        if self.config.stage.name in ("ppo", "evaluate"):
            self._ping()
        for folder, build in zip(self.needed(), (self._build_sft, self._build_reward), strict=False):
            cache.ensure(folder, build)
            self._hand_over(folder.name, folder)
        stage = self.config.stage.name
        if stage in ("sft", "reward"):
            shutil.copytree(self.needed()[-1], self.folder, dirs_exist_ok=True)
            return tracking.read_summary(self.folder) or {}
        summary = self._ppo(train=stage == "ppo")
        cache.register_run(self.outputs, self.identity, self.folder)
        self._hand_over(tracking.run_id(summary), self.folder)
        return summary

    def _build_sft(self, folder: Path) -> None:
        started, settings = time.time(), self.settings.sft
        log.info("training the SFT model (%s)", self.sft_folder.name)
        lightning.seed_everything(settings.seed, verbose=False)
        tokenizer = load_tokenizer(self.settings.model, self.source)
        roles = sft_roles(self.settings, tokenizer, self.quantization)
        train, held_out = self._split("sft", "sft_validation", settings.validation_size)
        steps = steps_of(settings, len(train))
        stage = SupervisedFineTuning(settings, roles, tokenizer, steps)
        stage.guards = Guards(self.settings.guards, folder)
        metrics = train_supervised(self._trainer, stage, settings, stage.encode(train), stage.encode(held_out), folder)
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

    def _build_reward(self, folder: Path) -> None:
        started, settings = time.time(), self.settings.reward
        log.info("training the reward model (%s)", self.reward_folder.name)
        lightning.seed_everything(settings.seed, verbose=False)
        base = self.sft_folder / "model"
        tokenizer = load_tokenizer(self.settings.model, self.source)
        roles = reward_roles(self.settings, tokenizer, base, self.quantization)
        train, held_out = self._split("preference", "preference_validation", settings.validation_size)
        steps = steps_of(settings, len(train))
        stage = RewardModeling(settings, roles, tokenizer, steps)
        stage.guards = Guards(self.settings.guards, folder)
        metrics = train_supervised(self._trainer, stage, settings, stage.encode(train), stage.encode(held_out), folder)
        demonstrations = records(self.source.load("sft").select(range(settings.centre_on)), "sft")
        metrics["reward/baseline"] = stage.baseline(demonstrations)
        if settings.lora.r:
            save_adapter(roles, "reward", lora_config(settings.lora), base, tokenizer, folder / "model")
        else:
            self._save_full_reward(roles, tokenizer, folder / "model")
        told = {"rows": {"preference": len(train)}, "guards": stage.guards.summary()}
        tracking.write_summary(folder, metrics, self.plain, started, stage="reward", **told)

    def _save_full_reward(self, roles: Roles, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        model = AutoModelForSequenceClassification.from_pretrained(self.sft_folder / "model", num_labels=1)
        model.base_model.load_state_dict(roles.trunk("reward").base_model.state_dict())
        model.score.weight.data = roles.heads["reward"].weight.data.to(model.dtype)
        save_model(model, tokenizer, folder)
        from safetensors.torch import save_file

        # the float32 head, not its copy in the model's dtype
        save_file({"score.weight": roles.heads["reward"].state_dict()["weight"].cpu()}, folder / HEAD)

    def _ppo(self, train: bool) -> dict[str, Any]:
        started, settings = time.time(), self.settings
        lightning.seed_everything(settings.seed, verbose=False)
        tokenizer = load_tokenizer(settings.model, self.source)
        reward = self.reward_folder if self.needs_reward_model else None
        baseline = tracking.read_summary(reward)["metrics"]["reward/baseline"] if reward else 0.0  # type: ignore[index]
        quantization = self.quantization
        roles = ppo_roles(settings, tokenizer, self.sft_folder / "model", reward and reward / "model", quantization)
        roles.to(_device(self.config))
        cached = self.outputs / "cache"
        context = Context(self.source, tokenizer, roles, baseline, settings.ppo.microbatch_tokens, cached)
        scored = self.config.evaluation.get("factscore")
        factscore = instantiate(scored, "evaluation.factscore", cached) if scored else None
        stage = PPO(
            settings,
            roles,
            tokenizer,
            make_engine(settings.generation, tokenizer, roles),
            instantiate(self.config.scorer, "scorer", context),
            hydra.utils.get_method(settings.divergence.function),
            instantiate(self.config.kl, "kl"),
            Evaluation(self.source, instantiate(self.config.judge, "judge", context), self._export, factscore),
            self.folder / "samples.jsonl",
        )
        held_out = self._held_out(factscore)[: settings.evaluation.prompts]
        evaluation = DataLoader(held_out, batch_size=settings.generation.batch_size, collate_fn=list)  # type: ignore[arg-type, var-annotated]
        told: dict[str, Any] = {}
        if train:
            prompts = self._prompts(tokenizer)
            best = self._best
            first = train_ppo(self._trainer, stage, prompts, evaluation, self.folder, self.config.resume, best)
            self._save_policy(roles, tokenizer, self.folder / "model")
            told["best"] = self._save_best(stage, best) if best else None
        else:
            first = self._evaluate(stage, evaluation)
        return tracking.write_summary(
            self.folder,
            stage.last_evaluation,
            self.plain,
            started,
            stage=self.config.stage.name,
            sft_metrics=first,
            reward_model=reward and reward.name,
            guards=stage.guards.summary(),
            overrides=self.overrides,
            identity=self.identity,
            **told,
        )

    @property
    def _best(self) -> Best | None:
        metric = best_metric(self.config, self.settings, self.source)
        return Best(self.folder, metric, self.settings.ppo.keep_best_mode) if metric else None

    def _save_policy(self, roles: Roles, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        lora = self.settings.lora
        if lora.r:
            save_adapter(roles, "policy", lora_config(lora), self.sft_folder / "model", tokenizer, folder)
        else:
            save_model(roles.trunk("policy").to(DTYPES[self.settings.model.dtype]), tokenizer, folder)

    def _save_best(self, stage: PPO, best: Best) -> dict[str, Any] | None:
        """Leave the policy of the best evaluation as `model_best/`, unless it is the last; say which it was."""
        step = best.step()
        if step is None:
            log.warning("no evaluation has %s, so that none is the best", best.metric)
            return None
        metrics = tracking.evaluated_at(self.folder, step)
        told = {"step": step, "metric": best.metric, "value": metrics[best.metric], "metrics": metrics}
        if step == stage.ppo_step:
            return {**told, "model": "model"}
        found = StepCheckpoints(self.folder / "checkpoints", 1, best=best).of_best()
        if found is None:
            return {**told, "model": None}
        stage.load_trained(found)
        self._save_policy(stage.roles, stage.tokenizer, self.folder / BEST_MODEL)
        log.info("the best evaluation by %s is that of step %d: its policy is in %s/", best.metric, step, BEST_MODEL)
        return {**told, "model": BEST_MODEL}

    def _evaluate(self, stage: PPO, evaluation: DataLoader) -> dict[str, float]:
        leaving = Interruption(StepCheckpoints(self.folder / "checkpoints", 1))
        self._trainer(self.folder, callbacks=[leaving]).validate(stage, evaluation, verbose=False)
        return dict(stage.last_evaluation)

    # -- parts -------------------------------------------------------------------------------------------------------

    def _trainer(self, folder: Path, **options: Any) -> lightning.Trainer:
        quiet = {"enable_model_summary": False, "num_sanity_val_steps": 0, "enable_checkpointing": False}
        quiet["enable_progress_bar"] = self.progress
        options = {**quiet, "inference_mode": False, "log_every_n_steps": 1, "logger": self._loggers(folder), **options}
        return instantiate(self.config.trainer, "trainer", **options)

    def _loggers(self, folder: Path) -> list[Logger]:
        """`metrics.jsonl` and what is configured; a stage built for the cache has a W&B run of its own, or none."""
        lines = tracking.JsonLines(folder)
        if target_class(self.config.logger, "logger") is not tracking.wandb_logger:
            return [lines, instantiate(self.config.logger, "logger")] if folder == self.folder else [lines]
        stage, name, needed = self.config.stage.name, self.folder.name, self.needed()
        known = f"{stage}-{self.identity}"
        if folder != self.folder:
            known = name = folder.name.removeprefix(".").removesuffix(".building")
            stage, needed = name.partition("-")[0], list(takewhile(lambda path: path.name != name, needed))
        continued = "allow" if StepCheckpoints.reached(folder / "checkpoints") else None  # None: over what was there
        chosen = {"id": known, "name": name, "job_type": stage, "resume": continued, "save_dir": str(self.folder)}
        if self.offline:  # who could not be reached for one stage is not waited for again
            chosen["mode"] = "offline"
        self.dashboard = dashboard = instantiate(self.config.logger, "logger", **chosen)
        self.offline = dashboard.offline
        dashboard.log_hyperparams(self.plain)
        for path in needed:
            dashboard.uses(path.name, path)
        return [lines, dashboard]

    def _hand_over(self, name: str, folder: Path) -> None:
        """End the W&B run of the stage just made, if there is one, with its model for the next stage."""
        if self.dashboard is not None:
            self.dashboard.leaves(name, folder)
            self.dashboard.close()
            self.dashboard = None

    def _split(self, split: Split, held_out: Split, size: int) -> tuple[list, list]:
        """Training and held-out rows: the data set's own validation split, or the end of the training split."""
        rows = self.source.load(split)
        if held_out in self.source.splits:
            other = self.source.load(held_out)
            return records(rows, split), records(other.select(range(min(size, len(other)))), held_out)
        if len(rows) <= size:
            raise DataError(f"the split {split} has {len(rows)} rows, too few to hold out {size}")
        everything = records(rows.shuffle(seed=0), split)
        return everything[:-size], everything[-size:]

    def _held_out(self, factscore: FactScore | None) -> list[Prompt]:
        """The evaluation set: the data set's own, or a prompt about each entity."""
        if factscore is None:
            return records(self.source.load("eval"), "eval")
        template = self.plain["data"].get("template")
        return factscore.prompts(parse_template(template) if template else None)

    def _export(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> None:
        dataset = str(self.plain["data"]["_target_"]).rpartition(".")[2].lower()
        alpaca_eval.export(self.folder, prompts, responses, f"{self.plain['name']}/{self.folder.name}", dataset)

    def _ping(self) -> None:
        """See whether the endpoints that will be asked answer."""
        scored = self.config.evaluation.get("factscore")
        node, key = (scored, "evaluation.factscore") if scored else (self.config.judge, "judge")
        target = target_class(node, key)
        if hasattr(target, "ping"):
            target.ping(OmegaConf.to_container(node, resolve=True))

    def _prompts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        limit = self.settings.model.max_prompt_tokens
        prompts: list[str] = self.source.load("prompts")["prompt"]
        kept = [p for p, ids in zip(prompts, encode(tokenizer, prompts), strict=True) if len(ids) <= limit]
        if len(kept) < len(prompts):
            log.warning("%d of %d prompts are longer than model.max_prompt_tokens=%d and left out",
                        len(prompts) - len(kept), len(prompts), limit)  # fmt: skip
        if len(kept) == 0:
            raise DataError(f"no prompt has at most model.max_prompt_tokens={limit} tokens")
        return kept


def steps_of(settings: SFTSettings | RewardSettings, rows: int) -> int:
    """Optimiser steps of a supervised stage: its epochs over the rows, or fewer."""
    steps = math.ceil(settings.epochs * rows / settings.batch_size)
    return min(steps, settings.max_steps or steps)


def records(rows: Dataset, split: Split) -> list:
    """The rows as records of their split."""
    return [RECORDS[split](**row) for row in rows]


def _without_clients(node: Any) -> Any:
    """Leave out how answers are fetched (rlhf.evaluation.endpoint.ClientSettings), which does not change them."""
    if not isinstance(node, dict):
        return node
    return {key: _without_clients(value) for key, value in node.items() if key != "client"}


def _device(config: DictConfig) -> str:
    wanted = config.trainer.get("accelerator", "auto")
    return "cuda" if torch.cuda.is_available() and wanted in ("auto", "gpu", "cuda") else "cpu"
