"""Does a run: builds what it needs, then trains or evaluates, or measures a finished one again.

The one place that puts all parts together.
"""

import gc
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

from rlhf.distributed import collectives, lockstep, processes
from rlhf.distributed.strategies import SingleDevice
from rlhf.evaluation.preferences import Simulated
from rlhf.files import BEST_MODEL, MODEL, SAMPLES, copy_folder
from rlhf.guards import Guards
from rlhf.models.assembly import load_policy
from rlhf.models.export import save_adapter, save_model
from rlhf.models.loading import DTYPES
from rlhf.models.roles import Roles
from rlhf.models.sharding import shard
from rlhf.pipeline import cache, measuring, members
from rlhf.pipeline.allocation import keep_freed_memory
from rlhf.pipeline.bars import with_displays
from rlhf.pipeline.builders import Site
from rlhf.pipeline.builders.preferences import build_preferences, prepare_preferences
from rlhf.pipeline.builders.reward import build_reward
from rlhf.pipeline.builders.sft import build_sft
from rlhf.pipeline.builders.taken import build_taken
from rlhf.pipeline.checkpoints import Best, StepCheckpoints
from rlhf.pipeline.config import instantiate
from rlhf.pipeline.evaluating import best_metric, make_evaluator, ping
from rlhf.pipeline.extras import with_extras
from rlhf.pipeline.interruption import Interruption
from rlhf.pipeline.kept_policies import KeptPolicies
from rlhf.pipeline.loggers import Loggers
from rlhf.pipeline.methods import load_roles, make_stage, training_rows
from rlhf.pipeline.numerics import settle_numerics
from rlhf.pipeline.plan import Plan
from rlhf.pipeline.plateau import Plateau
from rlhf.pipeline.reward_scorer import reward_scorer
from rlhf.pipeline.taken import IDS
from rlhf.pipeline.train_policy import measure_untrained, train_policy
from rlhf.policy_settings import METHODS
from rlhf.rollout.trial import try_out
from rlhf.scorers import Context
from rlhf.stages.evaluation import PolicyEvaluation
from rlhf.stages.reward import warn_of_spread
from rlhf.tracking import sessions
from rlhf.tracking.metrics_file import evaluated_at
from rlhf.tracking.summary import environment, read_summary, run_id, write_summary

log = logging.getLogger(__name__)


class Run:
    """Turns a plan into results."""

    def __init__(self, plan: Plan, progress: bool = True):
        self.plan, self.progress = plan, progress
        self.config, self.settings, self.source = plan.config, plan.settings, plan.source
        self.loggers, self.site = Loggers(plan), self._site(plan)
        settle_numerics(plan.config.trainer.get("deterministic"))
        keep_freed_memory()

    def run(self) -> dict[str, Any]:
        """Build what is missing, then do the stage itself; returns the summary."""
        plan = self.plan
        # 1. Find out early what would fail late: an endpoint that does not answer.
        if plan.stage in (*METHODS, "evaluate"):
            collectives.on_rank_zero(lambda: ping(self.config))
        # 2. Build the models and comparisons that are missing.
        self._build()
        if plan.stage in ("sft", "preferences", "reward"):
            last = plan.needed()[plan.stage]
            collectives.on_rank_zero(lambda: copy_folder(last, plan.folder))
            return read_summary(plan.folder) or {}
        # 3. Train or evaluate the policy.
        summary = self._train_or_evaluate(train=plan.stage in METHODS)
        collectives.on_rank_zero(lambda: cache.register_run(plan.outputs, plan.identity, plan.folder))
        self.loggers.hand_over(run_id(summary), plan.folder)
        return summary

    def measure(self, todo: Mapping[int, Path | None], folder: Path) -> dict[str, Any]:
        """Measure policies of the finished run in the plan's folder, without a training step; returns the summary.

        `todo` maps steps to the folders of their weights (None: the SFT model). Results are written to `folder`, where
        those of other steps may be already; it is not the run's own, which has those of its training.
        """
        started, plan = time.monotonic(), self.plan
        collectives.on_rank_zero(lambda: measuring.check_sound(plan.folder, folder))
        collectives.on_rank_zero(lambda: ping(self.config))
        self._build()
        lightning.seed_everything(self.settings.seed, verbose=False)
        stage, evaluation = self._load(folder, exports=not measuring.has_later(folder, max(todo)))
        stage.guards = Guards()  # they watch the training, and could stop nothing here
        collectives.on_rank_zero(lambda: measuring.make_ready(folder))
        found = environment()
        collectives.on_rank_zero(lambda: sessions.begin_measuring(folder, min(todo), found))
        trainer = self._evaluation_trainer(folder)
        for step, model in sorted(todo.items()):
            if model is not None:
                load_policy(stage.roles, self.settings, stage.tokenizer, model)
            stage.steps_done = step
            trainer.validate(stage, evaluation, verbose=False)
        self.loggers.hand_over(f"evaluate-{plan.identity}-{plan.evaluation}", folder)
        results = collectives.on_rank_zero(lambda: measuring.evaluation_results(plan, folder))
        more = {**results, "stage": "evaluate", "evaluation": plan.evaluation, "overrides": plan.overrides}
        return write_summary(folder, more.pop("metrics"), plan.plain, started, **more)

    def _build(self) -> None:
        """Build the models and comparisons that this run shares with others, where they are missing."""
        plan, needed = self.plan, collectives.on_rank_zero(lambda: members.needed(self.plan))
        missing = collectives.on_rank_zero(lambda: [path for path in needed.values() if cache.missing(path)])
        collectives.on_rank_zero(lambda: cache.check_writable(missing))
        if plan.preferences_folder in missing:
            prepare_preferences(self.site, self._simulated)
        for product, folder in needed.items():
            cache.ensure(folder, self._builder(product))
            lockstep.disable()
            gc.collect()  # a stage and its trainer refer to each other, and hold models on the device
            self.loggers.hand_over(folder.name, folder)
            if members.stage_of(product) == "reward":
                warn_of_spread(folder.name, (read_summary(folder) or {}).get("metrics", {}))

    def _builder(self, product: str) -> Callable[[Path], None]:
        """The function that builds a product of the cache into a folder."""
        sft, preferences, plan = self.plan.sft_folder, self.plan.preferences_folder, members.plan_of(self.plan, product)
        own = plan.beside or plan
        if product in self.plan.taken:
            return partial(build_taken, self.site, taken=self.plan.taken[product], device=self._device)
        if members.stage_of(product) == "sft":
            return partial(build_sft, self.site if product == "sft" else self._site(own))
        if members.stage_of(product) == "reward":
            trained: dict[str, Any] = {"sft": own.sft_folder, "preferences": preferences}
            return partial(build_reward, self._site(own), **trained, members=members.averaged(plan))
        return partial(build_preferences, self.site, simulated=self._simulated, sft=sft, device=self._device)

    def _site(self, plan: Plan) -> Site:
        return Site(plan.settings, plan.plain, plan.source, plan.quantization, self._make_trainer, self._place_models)

    @property
    def _simulated(self) -> Simulated:
        assert isinstance(self.plan.comparisons, Simulated)
        return self.plan.comparisons

    # -- the policy ----------------------------------------------------------------------------------------------------

    def _train_or_evaluate(self, train: bool) -> dict[str, Any]:
        """Train the policy or just evaluate the SFT model (stage=evaluate)."""
        started, settings, plan = time.monotonic(), self.settings, self.plan
        method = settings.method(plan.stage)
        lightning.seed_everything(settings.seed, verbose=False)
        # 1. The models, and all that scores and judges what they say.
        stage, evaluation = self._load(plan.folder)
        # 2. The training, or the evaluation alone.
        more: dict[str, Any] = {}
        if train:
            keep = self._best
            before, more = self._train(stage, evaluation, keep)
            more |= {"best": collectives.on_rank_zero(lambda: self._save_best(stage, keep)) if keep else None}
            plateau = Plateau.of(method, keep)
            more |= {"plateau": collectives.on_rank_zero(plateau.describe)} if plateau else {}
        else:
            before = measure_untrained(self._evaluation_trainer(plan.folder), stage, evaluation, plan.folder)
        # 3. What it came to.
        return write_summary(
            plan.folder,
            stage.last_evaluation,
            plan.plain,
            started,
            stage=plan.stage,
            sft_metrics=before,
            sft_model=plan.sft_folder.name,
            **measuring.noted(plan),
            guards=stage.guards.summary(),
            microbatch_tokens=method.microbatch_tokens,
            generation_batch_size=settings.generation.batch_size,
            overrides=plan.overrides,
            identity=plan.identity,
            evaluation=plan.evaluation,
            **more,
        )

    def _load(self, folder: Path, exports: bool = True) -> tuple[PolicyEvaluation, DataLoader]:
        """The stage, whose policy is the SFT model, and the prompts that it is evaluated on.

        What evaluations say is written to `folder`, and their answers in AlpacaEval's format, too, if it `exports`.
        """
        plan, cached = self.plan, self.plan.outputs / "cache"
        # 1. The models.
        tokenizer, base = measuring.tokenizer_of(plan), plan.sft_folder / MODEL
        reward = plan.reward_folder if plan.needs_reward_model else None
        role = reward / MODEL if reward and plan.reward_reads == IDS else None
        others = members.scoring(plan)
        roles = load_roles(plan, tokenizer, base, role, others)
        self._place_models(roles)
        # 2. All that scores and judges what they say.
        measured: dict[str, float] = read_summary(reward)["metrics"] if reward else {}  # type: ignore[index]
        baseline = measured["reward/baseline"] if reward else 0.0
        budget = self.settings.method(plan.stage).microbatch_tokens
        context = Context(self.source, tokenizer, roles, baseline, budget, cached)
        context.reward, context.members = reward_scorer(context, plan) if reward else None, members.baselines(others)
        scorer = instantiate(self.config.scorer, "scorer", context)
        evaluator, prompts = make_evaluator(plan, context, folder if exports else None)
        stage = make_stage(plan, roles, tokenizer, scorer, evaluator, folder / SAMPLES)
        return with_extras(stage, plan, prompts.dataset), prompts  # type: ignore[arg-type]

    def _train(
        self, stage: PolicyEvaluation, evaluation: DataLoader, best: Best | None
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Train and save the policy; returns the evaluation of the SFT model, and what the summary says of the rows."""
        folder, resume = self.plan.folder, self.config.resume
        rows, counts = training_rows(self.plan, stage)
        keeping = [KeptPolicies(folder, self._save_policy)] if stage.settings.keep_evaluated else []
        before = train_policy(self._make_trainer, stage, rows, evaluation, folder, resume, best, keeping)
        collectives.on_rank_zero(lambda: self._save_policy(stage, folder / MODEL))
        return before, counts

    def _evaluation_trainer(self, folder: Path) -> lightning.Trainer:
        """A trainer that only validates, and that a signal stops between two batches."""
        return self._make_trainer(folder, callbacks=[Interruption(StepCheckpoints(folder / "checkpoints", 1))])

    @property
    def _best(self) -> Best | None:
        metric = best_metric(self.config, self.settings, self.source)
        mode = self.settings.method(self.plan.stage).keep_best_mode
        return Best(self.plan.folder, metric, mode) if metric else None

    def _save_policy(self, stage: PolicyEvaluation, folder: Path) -> None:
        roles, sft = stage.roles, self.plan.sft_folder / MODEL
        if self.settings.lora.r:
            save_adapter(roles, "policy", roles.adapter_config("policy"), sft, stage.tokenizer, folder)
        else:
            save_model(roles.trunk("policy").to(DTYPES[self.settings.model.dtype]), stage.tokenizer, folder)

    def _save_best(self, stage: PolicyEvaluation, best: Best) -> dict[str, Any] | None:
        """Save the policy of the best evaluation as `model_best/` unless it is the last one; describe it."""
        step = best.step()
        if step is None:
            log.warning("no evaluation has %s, so that none is the best", best.metric)
            return None
        metrics = evaluated_at(self.plan.folder, step)
        value = metrics[best.metric]
        described = {"step": step, "among": best.steps, "metric": best.metric, "value": value, "metrics": metrics}
        if step == stage.steps_done:
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
        return instantiate(self.config.trainer, "trainer", **with_displays({**defaults, **options}, folder))

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
