"""Puts a run together: data, models, stage, trainer, evaluation. The only place that knows all of them."""

import logging
import time
from collections.abc import Callable, Collection, Sequence
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from rlhf.data.records import SPLITS, DataSource, Prompt, Split, divided, records
from rlhf.distributed import collectives, lockstep, processes
from rlhf.evaluation import alpaca_eval
from rlhf.evaluation.difficulty import difficulties
from rlhf.evaluation.evaluate import Evaluation, Judge, instruction_of
from rlhf.evaluation.factscore import FactScore
from rlhf.files import BEST_MODEL, MODEL, copy_folder
from rlhf.models.assembly import lora_config, ppo_roles
from rlhf.models.export import save_adapter, save_model
from rlhf.models.loading import DTYPES, load_tokenizer
from rlhf.models.roles import Roles
from rlhf.models.sharding import shard
from rlhf.models.tokenizing import short_enough
from rlhf.pipeline import cache, earlier, identity
from rlhf.pipeline.allocation import keep_freed_memory
from rlhf.pipeline.build import Builder, save_full_reward, steps_of
from rlhf.pipeline.checkpoints import Best, StepCheckpoints
from rlhf.pipeline.config import best_metric, instantiate, needs, target_class
from rlhf.pipeline.interruption import Interruption
from rlhf.pipeline.train import train_ppo, train_supervised
from rlhf.rollout.trial import try_out
from rlhf.scorers import Context
from rlhf.settings import Settings, is_quantized
from rlhf.stages.ppo import PPO, make_ppo
from rlhf.tracking import dashboards
from rlhf.tracking.dashboards import Dashboard
from rlhf.tracking.metrics_file import JsonLines, evaluated_at
from rlhf.tracking.summary import read_summary, run_id, write_summary

log = logging.getLogger(__name__)
Build = Callable[[Path], None]
# The code that decides what is cached: these modules and all of ours that they import (`identity.code_of`).
SFT_CODE = ("rlhf.stages.sft", "rlhf.stages.batches", "rlhf.models.assembly")
REWARD_CODE = (*SFT_CODE, "rlhf.stages.reward")
PREFERENCES_CODE = (*SFT_CODE, "rlhf.rollout.sample", "rlhf.rollout.vllm", "rlhf.evaluation.preferences")
# The functions of modules that hold others too which decide it as well.
_TRAINING = (train_supervised, divided, records, steps_of)
BUILDING: dict[str, tuple[Callable[..., Any], ...]] = {
    "sft": (Builder.sft, Builder._save_sft, *_TRAINING),
    "reward": (Builder.reward, save_full_reward, *_TRAINING),
    "preferences": (Builder._simulate, short_enough),
}
# Keys that name, place or show a run. Of `preferences` the name of the reward model tells, where there is one.
NOT_IDENTITY = ("name", "output_dir", "resume", "dry_run", "logger", "trainer", "report", "variant", "guards",
                "objectives", "preferences")  # fmt: skip


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
        self._builder = Builder(settings, self.plain, source, self.quantization, self._trainer, self._place)
        self.dashboard: Dashboard | None = None
        self.offline = False
        torch.set_float32_matmul_precision("high")
        keep_freed_memory()

    # -- what is cached ----------------------------------------------------------------------------------------------

    @cached_property
    def sft_folder(self) -> Path:
        """Where the SFT model of this configuration is, or will be."""
        return self._cached("sft", {}, SFT_CODE, ("sft", "sft_validation"))

    @cached_property
    def reward_folder(self) -> Path:
        """Where the reward model of this configuration is, or will be."""
        upstream = {"sft_model": self.sft_folder.name}
        if self.preferences_folder:
            upstream["preferences"] = self.preferences_folder.name
        return self._cached("reward", upstream, REWARD_CODE, ("preference", "preference_validation"))

    @cached_property
    def preferences_folder(self) -> Path | None:
        """Where the comparisons of the SFT model's answers are, or will be; None if those of the data set are taken."""
        if not self._builder.comparisons.simulated:
            return None
        sampled = {key: self.plain["generation"][key] for key in ("engine", "batch_size")}
        return self._cached("preferences", {"sft_model": self.sft_folder.name, **sampled}, PREFERENCES_CODE, SPLITS)

    def _cached(
        self, stage: str, upstream: dict[str, Any], modules: tuple[str, ...], splits: Collection[Split]
    ) -> Path:
        """`cache/<stage>-<digest>`, of all that decides what is there; `splits` are those that it reads."""
        model = dict(self.plain["model"])
        if stage != "preferences":
            del model["max_prompt_tokens"]  # training reads none of the prompts
        determinants = {
            "model": model,
            "data": identity.of_data(self.plain["data"], self.source, splits),
            **{key: self.plain[key] for key in ("quantization", stage)},
            **upstream,
            **self._how,
        }
        code = identity.source_of((*modules, type(self.source).__module__), BUILDING[stage])
        name = identity.digest(identity.decisive(determinants), code, self._known)
        return (self.outputs / "cache" / f"{stage}-{name}").resolve()

    @cached_property
    def identity(self) -> str:
        """A digest of the configuration and the models it starts from: two runs of one identity are the same run.

        PPO's own code is left out, so that a mended line does not throw away a week of runs; reports name commits.
        """
        chosen = {key: value for key, value in self.plain.items() if key not in NOT_IDENTITY}
        needed = [path.name for path in self.needed()]
        return identity.digest(identity.decisive({**chosen, "needed": needed, **self._how}), known=self._known)

    @property
    def _how(self) -> dict[str, Any]:
        """What decides a result of the keys that mostly do not."""
        skips = self.settings.guards.non_finite.action != "off"
        return {"trainer": identity.of_trainer(self.plain["trainer"]), "skips_non_finite": skips}

    @property
    def present(self) -> str:
        """What is in the folder now, in words, for when it has to move aside."""
        return earlier.describe(self.folder, self.plain, NOT_IDENTITY)

    @property
    def outputs(self) -> Path:
        """Where all runs and the cache are."""
        return Path(self.plain["output_dir"])

    @property
    def _known(self) -> Path:
        """Where digests of files are kept."""
        return self.outputs / "cache" / "digests"

    def finished(self) -> Path | None:
        """The folder of this very run, finished here, moved aside from here, or under another name."""
        for folder in (self.folder, earlier.place(self.folder, self.identity)):
            summary = read_summary(folder)
            if summary is not None and summary.get("identity") == self.identity:
                return folder
        return cache.find_run(self.outputs, self.identity)

    def needed(self) -> dict[Path, Build]:
        """The cached folders that this run needs and what builds them, in that order."""
        stage, builder = self.config.stage.name, self._builder
        folders: dict[Path, Build] = {self.sft_folder: builder.sft}
        reward = stage == "reward" or (stage in ("ppo", "evaluate") and self.needs_reward_model)
        if self.preferences_folder and (reward or stage == "preferences"):
            device = _device(self.config)
            folders[self.preferences_folder] = partial(builder.preferences, sft=self.sft_folder, device=device)
        if reward:
            folders[self.reward_folder] = partial(
                builder.reward, sft=self.sft_folder, preferences=self.preferences_folder
            )
        return folders

    @property
    def needs_reward_model(self) -> bool:
        """Whether the scorer or the judge reads a reward model."""
        return any(needs(self.config, key, "needs_reward_model") for key in ("scorer", "judge"))

    # -- the stages --------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Build what is missing, then the stage itself; returns the summary."""
        if self.config.stage.name in ("ppo", "evaluate"):
            collectives.on_rank_zero(self._ping)
        missing = collectives.on_rank_zero(lambda: [path for path in self.needed() if cache.missing(path)])
        collectives.on_rank_zero(lambda: cache.check_writable(missing))
        if self.preferences_folder in missing:
            self._builder.prepare_preferences()
        for folder, build in self.needed().items():
            cache.ensure(folder, build)
            lockstep.disable()
            self._hand_over(folder.name, folder)
        stage = self.config.stage.name
        if stage in ("sft", "preferences", "reward"):
            last = list(self.needed())[-1]
            collectives.on_rank_zero(lambda: copy_folder(last, self.folder))
            return read_summary(self.folder) or {}
        summary = self._ppo(train=stage == "ppo")
        collectives.on_rank_zero(lambda: cache.register_run(self.outputs, self.identity, self.folder))
        self._hand_over(run_id(summary), self.folder)
        return summary

    def _ppo(self, train: bool) -> dict[str, Any]:
        started, settings = time.monotonic(), self.settings
        lightning.seed_everything(settings.seed, verbose=False)
        tokenizer = load_tokenizer(settings.model, self.source)
        reward = self.reward_folder if self.needs_reward_model else None
        baseline = read_summary(reward)["metrics"]["reward/baseline"] if reward else 0.0  # type: ignore[index]
        quantization = self.quantization
        roles = ppo_roles(settings, tokenizer, self.sft_folder / MODEL, reward and reward / MODEL, quantization)
        self._place(roles)
        cached = self.outputs / "cache"
        context = Context(self.source, tokenizer, roles, baseline, settings.ppo.microbatch_tokens, cached)
        scored = self.config.evaluation.get("factscore")
        factscore = instantiate(scored, "evaluation.factscore", cached) if scored else None
        held_out = self._held_out(factscore)
        scorer, kl = instantiate(self.config.scorer, "scorer", context), instantiate(self.config.kl, "kl")
        evaluator = self._evaluation(instantiate(self.config.judge, "judge", context), held_out, factscore)
        stage = make_ppo(settings, roles, tokenizer, scorer, kl, evaluator, self.folder / "samples.jsonl")
        held_out = held_out[: settings.evaluation.prompts]
        evaluation = DataLoader(held_out, batch_size=settings.generation.batch_size, collate_fn=list)  # type: ignore[arg-type, var-annotated]
        told: dict[str, Any] = {}
        if train:
            prompts = self._prompts(tokenizer)
            best = self._best
            first = train_ppo(self._trainer, stage, prompts, evaluation, self.folder, self.config.resume, best)
            collectives.on_rank_zero(lambda: self._save_policy(roles, tokenizer, self.folder / MODEL))
            told["best"] = collectives.on_rank_zero(lambda: self._save_best(stage, best)) if best else None
        else:
            first = self._evaluate(stage, evaluation)
        return write_summary(
            self.folder,
            stage.last_evaluation,
            self.plain,
            started,
            stage=self.config.stage.name,
            sft_metrics=first,
            reward_model=reward and reward.name,
            guards=stage.guards.summary(),
            microbatch_tokens=settings.ppo.microbatch_tokens,
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
            save_adapter(roles, "policy", lora_config(lora), self.sft_folder / MODEL, tokenizer, folder)
        else:
            save_model(roles.trunk("policy").to(DTYPES[self.settings.model.dtype]), tokenizer, folder)

    def _save_best(self, stage: PPO, best: Best) -> dict[str, Any] | None:
        """Leave the policy of the best evaluation as `model_best/`, unless it is the last; say which it was."""
        step = best.step()
        if step is None:
            log.warning("no evaluation has %s, so that none is the best", best.metric)
            return None
        metrics = evaluated_at(self.folder, step)
        told = {"step": step, "metric": best.metric, "value": metrics[best.metric], "metrics": metrics}
        if step == stage.ppo_step:
            return {**told, "model": MODEL}
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
        quiet: dict[str, Any] = {
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "enable_checkpointing": False,
            "enable_progress_bar": self.progress,
        }
        if collectives.size() > 1:  # each stage gives the processes their shares itself
            quiet |= {"use_distributed_sampler": False, "plugins": [processes.cluster_environment()]}
        options = {**quiet, "inference_mode": False, "log_every_n_steps": 1, "logger": self._loggers(folder), **options}
        return instantiate(self.config.trainer, "trainer", **options)

    def _place(self, roles: Roles, packing: bool = False) -> None:
        """Try the models out (`rlhf.rollout.trial`) and put them where they will train.

        The trial comes first, because a base that is spread over processes cannot be tried.
        """
        spread = processes.num_shards(self.config.trainer) > 1
        if not spread:
            roles.to(_device(self.config))
        engine = "" if self.config.stage.name == "sft" else self.settings.generation.engine
        try_out(roles, "reference", engine, packing)
        if spread:
            shard(roles, _device(self.config))

    def _loggers(self, folder: Path) -> list[Logger]:
        """`metrics.jsonl` and what is configured; a stage built for the cache has a W&B run of its own, or none."""
        if not collectives.is_rank_zero():
            return []
        lines = JsonLines(folder)
        if target_class(self.config.logger, "logger") is not dashboards.wandb_logger:
            return [lines, instantiate(self.config.logger, "logger")] if folder == self.folder else [lines]
        stage, name, needed = self.config.stage.name, self.folder.name, list(self.needed())
        known = f"{stage}-{self.identity}"
        if folder != self.folder:
            known = name = cache.name_of(folder)
            stage, needed = name.partition("-")[0], list(takewhile(lambda path: path.name != name, needed))
        continued = "allow" if StepCheckpoints.reached(folder / "checkpoints") else None  # None: over what was there
        chosen = {"id": known, "name": name, "job_type": stage, "resume": continued, "save_dir": str(self.folder)}
        if self.offline:  # who could not be reached for one stage is not waited for again
            chosen["mode"] = "offline"
        self.dashboard = dashboard = instantiate(self.config.logger, "logger", **chosen)
        self.offline = dashboard.offline
        row = ", ".join(item for item in self.overrides if not item.startswith("seed="))
        dashboard.log_hyperparams({**self.plain, "row": row or "PPO"})  # what the seeds of a row share
        for path in needed:
            dashboard.uses(path.name, path)
        return [lines, dashboard]

    def _hand_over(self, name: str, folder: Path) -> None:
        """End the W&B run of the stage just made, if there is one, with its model for the next stage."""
        if self.dashboard is not None:
            self.dashboard.leaves(name, folder)
            self.dashboard.close()
            self.dashboard = None

    def _evaluation(self, judge: Judge, held_out: Sequence[Prompt], factscore: FactScore | None) -> Evaluation:
        difficulty, prompts = self.settings.evaluation.difficulty, self.settings.evaluation.prompts
        known = difficulties(difficulty, [instruction_of(row) for row in held_out], prompts) if difficulty else None
        return Evaluation(self.source, judge, self._export, factscore, known)

    def _held_out(self, factscore: FactScore | None) -> list[Prompt]:
        """The evaluation set: the data set's own, or a prompt about each entity."""
        if factscore is None:
            return records(self.source.load("eval"), "eval")
        return factscore.prompts(self._builder.template)

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
        prompts = list(self.source.load("prompts")["prompt"])
        return [prompts[i] for i in short_enough(tokenizer, prompts, self.settings.model.max_prompt_tokens)]


def _device(config: DictConfig) -> str:
    wanted = config.trainer.get("accelerator", "auto")
    return "cuda" if torch.cuda.is_available() and wanted in ("auto", "gpu", "cuda") else "cpu"
