"""Does a run: builds what it needs, then trains or evaluates. The one place that puts all parts together."""

import gc
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from omegaconf import OmegaConf
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from rlhf.data.records import Prompt, as_records
from rlhf.distributed import collectives, lockstep, processes
from rlhf.distributed.strategies import SingleDevice
from rlhf.evaluation import alpaca_eval
from rlhf.evaluation.difficulty import load_difficulties
from rlhf.evaluation.evaluator import ResponseEvaluator
from rlhf.evaluation.factscore import FactScore
from rlhf.evaluation.preferences import Simulated
from rlhf.evaluation.prompts import instruction_or_prompt
from rlhf.files import BEST_MODEL, MODEL, copy_folder
from rlhf.models.assembly import lora_config, ppo_roles
from rlhf.models.export import save_adapter, save_model
from rlhf.models.loading import DTYPES, load_tokenizer
from rlhf.models.roles import Roles
from rlhf.models.sharding import shard
from rlhf.models.tokenizing import encode, short_enough
from rlhf.pipeline import cache
from rlhf.pipeline.allocation import keep_freed_memory
from rlhf.pipeline.builders import Site
from rlhf.pipeline.builders.preferences import build_preferences, prepare_preferences, template_of
from rlhf.pipeline.builders.reward import build_reward
from rlhf.pipeline.builders.sft import build_sft
from rlhf.pipeline.builders.taken import build_taken
from rlhf.pipeline.checkpoints import Best, StepCheckpoints
from rlhf.pipeline.checks import best_metric
from rlhf.pipeline.config import instantiate, target_class
from rlhf.pipeline.interruption import Interruption
from rlhf.pipeline.loggers import Loggers
from rlhf.pipeline.numerics import settle_numerics
from rlhf.pipeline.plan import Plan
from rlhf.pipeline.rendered import show_rendered
from rlhf.pipeline.reward_scorer import reward_scorer
from rlhf.pipeline.taken import IDS
from rlhf.pipeline.train_ppo import train_ppo
from rlhf.rollout.trial import try_out
from rlhf.scorers import Context
from rlhf.stages.ppo import PPO, make_ppo
from rlhf.tracking.metrics_file import evaluated_at
from rlhf.tracking.summary import read_summary, run_id, write_summary

log = logging.getLogger(__name__)


class Run:
    """Turns a plan into results."""

    def __init__(self, plan: Plan, progress: bool = True):
        self.plan, self.progress = plan, progress
        self.config, self.settings, self.source = plan.config, plan.settings, plan.source
        self.loggers = Loggers(plan)
        self.site = self._site(plan)
        settle_numerics(plan.config.trainer.get("deterministic"))
        keep_freed_memory()

    def run(self) -> dict[str, Any]:
        """Build what is missing, then do the stage itself; returns the summary."""
        plan = self.plan
        # 1. Find out early what would fail late: endpoints that do not answer, a cache that cannot be written.
        if plan.stage in ("ppo", "evaluate"):
            collectives.on_rank_zero(self._ping)
        missing = collectives.on_rank_zero(lambda: [path for path in plan.needed().values() if cache.missing(path)])
        collectives.on_rank_zero(lambda: cache.check_writable(missing))
        if plan.preferences_folder in missing:
            prepare_preferences(self.site, self._simulated)
        # 2. Build the models and comparisons that this run shares with others.
        for product, folder in plan.needed().items():
            cache.ensure(folder, self._builder(product))
            lockstep.disable()
            gc.collect()  # a stage and its trainer refer to each other, and hold models on the device
            self.loggers.hand_over(folder.name, folder)
        if plan.stage in ("sft", "preferences", "reward"):
            last = plan.needed()[plan.stage]
            collectives.on_rank_zero(lambda: copy_folder(last, plan.folder))
            return read_summary(plan.folder) or {}
        # 3. Train or evaluate the policy.
        summary = self._train_or_evaluate(train=plan.stage == "ppo")
        collectives.on_rank_zero(lambda: cache.register_run(plan.outputs, plan.identity, plan.folder))
        self.loggers.hand_over(run_id(summary), plan.folder)
        return summary

    def _builder(self, product: str) -> Callable[[Path], None]:
        """The function that builds a product of the cache into a folder."""
        sft, preferences, own = self.plan.sft_folder, self.plan.preferences_folder, self.plan.beside or self.plan
        if product in self.plan.taken:
            return partial(build_taken, self.site, taken=self.plan.taken[product], device=self._device)
        if product == "sft":
            return partial(build_sft, self.site)
        if product == "reward_sft":
            return partial(build_sft, self._site(own))
        if product == "reward":
            return partial(build_reward, self._site(own), sft=own.sft_folder, preferences=preferences)
        return partial(build_preferences, self.site, simulated=self._simulated, sft=sft, device=self._device)

    def _site(self, plan: Plan) -> Site:
        return Site(plan.settings, plan.plain, plan.source, plan.quantization, self._make_trainer, self._place_models)

    @property
    def _simulated(self) -> Simulated:
        assert isinstance(self.plan.comparisons, Simulated)
        return self.plan.comparisons

    # -- the policy ----------------------------------------------------------------------------------------------------

    def _train_or_evaluate(self, train: bool) -> dict[str, Any]:
        """Train the policy (stage=ppo) or just evaluate the SFT model (stage=evaluate)."""
        started, settings, plan = time.monotonic(), self.settings, self.plan
        lightning.seed_everything(settings.seed, verbose=False)
        # 1. The models, and all that scores and judges what they say.
        tokenizer = load_tokenizer(settings.model, self.source)
        reward = plan.reward_folder if plan.needs_reward_model else None
        role = reward / MODEL if reward and plan.reward_reads == IDS else None
        roles = ppo_roles(settings, tokenizer, plan.sft_folder / MODEL, role, plan.quantization)
        self._place_models(roles)
        stage, evaluation = self._make_stage(roles, tokenizer, reward)
        # 2. The training, or the evaluation alone.
        best: dict[str, Any] = {}
        if train:
            keep = self._best
            before = self._train(stage, evaluation, keep)
            best = {"best": collectives.on_rank_zero(lambda: self._save_best(stage, keep)) if keep else None}
        else:
            before = self._evaluate(stage, evaluation)
        # 3. What it came to.
        return write_summary(
            plan.folder,
            stage.last_evaluation,
            plan.plain,
            started,
            stage=plan.stage,
            sft_metrics=before,
            reward_model=reward and reward.name,
            reward_reads=plan.reward_reads,
            guards=stage.guards.summary(),
            microbatch_tokens=settings.ppo.microbatch_tokens,
            generation_batch_size=settings.generation.batch_size,
            overrides=plan.overrides,
            identity=plan.identity,
            **best,
        )

    def _make_stage(
        self, roles: Roles, tokenizer: PreTrainedTokenizerBase, reward: Path | None
    ) -> tuple[PPO, DataLoader]:
        """The PPO stage, and the prompts that it is evaluated on."""
        settings, cached = self.settings, self.plan.outputs / "cache"
        baseline = read_summary(reward)["metrics"]["reward/baseline"] if reward else 0.0  # type: ignore[index]
        context = Context(self.source, tokenizer, roles, baseline, settings.ppo.microbatch_tokens, cached)
        context.reward = reward_scorer(context, self.plan) if reward else None
        node = self.config.evaluation.get("factscore")
        factscore = instantiate(node, "evaluation.factscore", cached) if node else None
        held_out = self._held_out(factscore)
        scorer, kl = instantiate(self.config.scorer, "scorer", context), instantiate(self.config.kl, "kl")
        evaluator = self._evaluator(context, held_out, factscore)
        stage = make_ppo(settings, roles, tokenizer, scorer, kl, evaluator, self.plan.folder / "samples.jsonl")
        prompts = held_out[: settings.evaluation.prompts]
        return stage, DataLoader(prompts, batch_size=settings.generation.batch_size, collate_fn=list)  # type: ignore[arg-type]

    def _train(self, stage: PPO, evaluation: DataLoader, best: Best | None) -> dict[str, float]:
        """Train and save the policy; returns the evaluation of the SFT model."""
        prompts = list(self.source.load("prompts")["prompt"])
        kept = short_enough(stage.tokenizer, prompts, self.settings.model.max_prompt_tokens)
        prompts = [prompts[i] for i in kept]
        folder, resume = self.plan.folder, self.config.resume
        first = {"prompt": encode(stage.tokenizer, prompts[:1])[0]}
        collectives.on_rank_zero(lambda: show_rendered(folder, "ppo", stage.tokenizer, first))
        before = train_ppo(self._make_trainer, stage, prompts, evaluation, folder, resume, best)
        collectives.on_rank_zero(lambda: self._save_policy(stage, folder / MODEL))
        return before

    def _evaluate(self, stage: PPO, evaluation: DataLoader) -> dict[str, float]:
        folder = self.plan.folder
        leaving = Interruption(StepCheckpoints(folder / "checkpoints", 1))
        self._make_trainer(folder, callbacks=[leaving]).validate(stage, evaluation, verbose=False)
        return dict(stage.last_evaluation)

    @property
    def _best(self) -> Best | None:
        metric = best_metric(self.config, self.settings, self.source)
        return Best(self.plan.folder, metric, self.settings.ppo.keep_best_mode) if metric else None

    def _save_policy(self, stage: PPO, folder: Path) -> None:
        lora, sft = self.settings.lora, self.plan.sft_folder / MODEL
        if lora.r:
            save_adapter(stage.roles, "policy", lora_config(lora), sft, stage.tokenizer, folder)
        else:
            save_model(stage.roles.trunk("policy").to(DTYPES[self.settings.model.dtype]), stage.tokenizer, folder)

    def _save_best(self, stage: PPO, best: Best) -> dict[str, Any] | None:
        """Save the policy of the best evaluation as `model_best/` unless it is the last one; describe it."""
        step = best.step()
        if step is None:
            log.warning("no evaluation has %s, so that none is the best", best.metric)
            return None
        metrics = evaluated_at(self.plan.folder, step)
        described = {"step": step, "metric": best.metric, "value": metrics[best.metric], "metrics": metrics}
        if step == stage.ppo_step:
            return {**described, "model": MODEL}
        found = StepCheckpoints(self.plan.folder / "checkpoints", 1, best=best).sound_best()
        if found is None:
            return {**described, "model": None}
        stage.load_trained(found)
        self._save_policy(stage, self.plan.folder / BEST_MODEL)
        log.info("the best evaluation by %s is that of step %d: its policy is in %s/", best.metric, step, BEST_MODEL)
        return {**described, "model": BEST_MODEL}

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _make_trainer(self, folder: Path, **options: Any) -> lightning.Trainer:
        """The configured trainer, for a stage that works in `folder`."""
        defaults: dict[str, Any] = {
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "enable_checkpointing": False,
            "enable_progress_bar": self.progress,
            "inference_mode": False,
            "log_every_n_steps": 1,
            "logger": self.loggers.of(folder),
        }
        if collectives.size() > 1:  # each stage gives the processes their shares itself
            defaults |= {"use_distributed_sampler": False, "plugins": [processes.cluster_environment()]}
        if self.config.trainer.get("strategy") in (None, "auto"):
            defaults["strategy"] = SingleDevice()
        return instantiate(self.config.trainer, "trainer", **{**defaults, **options})

    def _place_models(self, roles: Roles, packing: bool = False) -> None:
        """Try the models out (`rlhf.rollout.trial`) and put them where they will train.

        The trial comes first, because a sharded base cannot be tried.
        """
        sharded = processes.num_shards(self.config.trainer) > 1
        if not sharded:
            roles.to(self._device)
        engine = "" if self.plan.stage == "sft" else self.settings.generation.engine
        try_out(roles, "reference", engine, packing)
        if sharded:
            shard(roles, self._device)

    @property
    def _device(self) -> str:
        wanted = self.config.trainer.get("accelerator", "auto")
        return "cuda" if torch.cuda.is_available() and wanted in ("auto", "gpu", "cuda") else "cpu"

    def _evaluator(
        self, context: Context, held_out: Sequence[Prompt], factscore: FactScore | None
    ) -> ResponseEvaluator:
        difficulty, prompts = self.settings.evaluation.difficulty, self.settings.evaluation.prompts
        known = (
            load_difficulties(difficulty, [instruction_or_prompt(row) for row in held_out], prompts)
            if difficulty
            else None
        )
        judge, node = instantiate(self.config.judge, "judge", context), self.config.evaluation.get("gold")
        gold = instantiate(node, "evaluation.gold", context) if node else None
        return ResponseEvaluator(self.source, judge, self._export, factscore, known, gold)

    def _held_out(self, factscore: FactScore | None) -> list[Prompt]:
        """The evaluation set: the data set's own, or for FActScore a prompt about each entity."""
        if factscore is None:
            return as_records(self.source.load("eval"), "eval")
        return factscore.prompts(template_of(self.plan.plain))

    def _export(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> None:
        """Write the answers in AlpacaEval's format, to be judged elsewhere too."""
        plan = self.plan
        dataset = str(plan.plain["data"]["_target_"]).rpartition(".")[2].lower()
        alpaca_eval.export(plan.folder, prompts, responses, f"{plan.plain['name']}/{plan.folder.name}", dataset)

    def _ping(self) -> None:
        """Check that the judge's endpoint responds.

        Raises:
            ConfigError: it cannot be reached.
        """
        scored = self.config.evaluation.get("factscore")
        node, key = (scored, "evaluation.factscore") if scored else (self.config.judge, "judge")
        target = target_class(node, key)
        if hasattr(target, "ping"):
            target.ping(OmegaConf.to_container(node, resolve=True))
