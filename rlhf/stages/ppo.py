"""PPO on a shared base, as in Sun, Gupta & Iyyer 2023: rollouts, penalised rewards, clipped updates."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_method
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from rlhf import ppo
from rlhf.advantages import Estimator
from rlhf.distributed import collectives
from rlhf.divergence import Divergence, configured
from rlhf.guards import Guards
from rlhf.guards.base import SKIPPED, Remedies
from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences
from rlhf.placement import Placement
from rlhf.rollout.engine import Engine
from rlhf.rollout.factory import make_engine, use_captured_logprobs
from rlhf.rollout.sample import Rollouts, rollout
from rlhf.scorers import totals
from rlhf.seeding import generator
from rlhf.settings import Settings
from rlhf.stages.batches import SeededBatches, loader
from rlhf.stages.evaluation import Evaluator, PolicyEvaluation
from rlhf.stages.experience import Experience, ExperienceMaker, rollout_metrics
from rlhf.stages.loss_terms import terms_of
from rlhf.stages.losses import LARGEST_RATIO, Losses
from rlhf.stages.minibatches import Microbatch, Minibatch, number_microbatches, split_minibatches
from rlhf.stages.passes import UpdatePasses, own_stream
from rlhf.stages.pretraining import PretrainingMix
from rlhf.stages.reference import Fixed, Reference, Rule
from rlhf.stages.scoring import score, spread_metrics

KL_EARLY_STOP = "KL"  # the reason to skip an update when the policy is far enough from the one that sampled
Scorer = Callable[[Rollouts], Float[Tensor, " batch"]]


def make_ppo(
    settings: Settings,
    roles: Roles,
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer,
    kl: ppo.FixedKL | ppo.AdaptiveKL,
    evaluator: Evaluator,
    samples: Path,
    rule: Rule | None = None,
) -> "PPO":
    """The stage that `settings` describe: with its engine (`generation`) and its divergence (`divergence.function`)."""
    engine = make_engine(settings.generation, tokenizer, roles)
    divergence, chosen = configured(settings.divergence), settings.advantages
    estimator = functools.partial(get_method(chosen.function), **chosen.options)
    return PPO(settings, roles, tokenizer, engine, scorer, divergence, estimator, kl, evaluator, samples, rule)


class PPO(PolicyEvaluation):
    """One training step is one rollout batch, `epochs` passes over it in minibatches, each one optimiser step.

    Rows are assigned to minibatches and micro-batches once per rollout batch; epochs visit the minibatches in a fresh
    order. Each of several processes answers its share of the prompts and has its share of every minibatch; means over
    the batch are over all of it. `scorer` gives a number per rollout, `evaluator` the metrics and a record per answer.
    Everything random is drawn from (seed, purpose, step), so a run continues from any step as if it had never stopped.
    """

    def __init__(
        self,
        settings: Settings,
        roles: Roles,
        tokenizer: PreTrainedTokenizerBase,
        engine: Engine,
        scorer: Scorer,
        divergence: Divergence,
        estimator: Estimator,
        kl: ppo.FixedKL | ppo.AdaptiveKL,
        evaluator: Evaluator,
        samples: Path,
        rule: Rule | None = None,
    ):
        # the rate that is used is self.settings.lr: whole models have one of their own
        lr = settings.ppo.lr if settings.lora.r else settings.ppo.lr_full
        super().__init__(dataclasses.replace(settings.ppo, lr=lr), settings.ppo.steps, settings.ppo.schedule_steps)
        self.config, self.ppo = settings, settings.ppo
        self.roles, self.tokenizer, self.engine = roles, tokenizer, engine
        self.scorer, self.divergence, self.kl, self.evaluator = scorer, divergence, kl, evaluator
        self.samples, self.reference, self.estimator = samples, Reference(rule or Fixed(), roles), estimator
        self.placement = Placement.of(kl, settings.divergence)
        exact = roles.in_float32 and settings.quantization is None
        self.guards = Guards(settings.guards.at_precision(exact), samples.parent, Remedies.of(settings, self.ppo))
        self.normalizer = ppo.ScoreNormalizer(
            self.ppo.score_normalization, self.ppo.score_clip, collectives.all_reduce_sum
        )
        self.ppo_step = 0
        self.lr_ratio = settings.lora.lr_ratio
        self.dropout = settings.lora.r > 0 and settings.lora.dropout > 0
        self.captured_are_old = use_captured_logprobs(settings.generation, roles)
        self.last_evaluation: dict[str, float] = {}
        self.ratio_counts: Tensor | None = None
        self.mix: PretrainingMix | None = None

    @property
    def passes(self) -> UpdatePasses:
        """The update's forward passes."""
        return UpdatePasses(self.roles, self.config.generation.temperature, self.config.seed, self.dropout)

    @property
    def steps_done(self) -> int:
        """Rollout batches finished so far."""
        return self.ppo_step

    @steps_done.setter
    def steps_done(self, step: int) -> None:
        self.ppo_step = step

    @property
    def prompts_per_step(self) -> int:
        """Prompts of a rollout batch, over all processes."""
        return self.ppo.rollout_batch_size // self.config.generation.samples_per_prompt

    def loader(self, rows: Sequence[str], start: int) -> DataLoader:
        """The prompts of each rollout batch, the same in all processes."""
        batches = SeededBatches(len(rows), self.prompts_per_step, self.config.seed, self.ppo.steps, start)
        return loader(rows, list, batches)

    # -- a rollout batch -----------------------------------------------------------------------------------------------

    def training_step(self, batch: list[str], index: int) -> None:
        """One rollout batch: sampled, scored, learned from, reported."""
        started, step = time.perf_counter(), self.ppo_step + 1
        self.reference.advance(self.ppo_step)
        # 1. Assign the prompts to processes and minibatches.
        samples = self.config.generation.samples_per_prompt
        prompts, shares = split_minibatches(batch, self.ppo.minibatch_size, self.config.seed, step, samples)
        # 2. Sample the policy's answers.
        self.roles.eval()
        with self.timed("generate"):
            stream = self.stream(own_stream("rollout"), step)
            rollouts = rollout(
                self.engine, self.roles, "policy", self.tokenizer, prompts, self.config.generation, stream
            )
            greedy = self.greedy_rollouts(prompts[::samples], step)
        minibatches = self.split_microbatches(rollouts.sequences, shares)
        # 3. Score the answers, and make of that a reward and an advantage per token.
        with self.timed("score"):
            scores = self.normalizer(score(self, rollouts, step)) - self.ppo.missing_eos_penalty * ~rollouts.ended
            spread = spread_metrics(self.scorer)  # of the rollouts, before greedy answers are scored
            baseline = None if greedy is None else self.greedy_scores(greedy).repeat_interleave(samples)
            experience = self.make_experience(rollouts, scores, minibatches, step, baseline)
        # 4. Update policy and value function.
        self.roles.train()
        with self.timed("update"):
            metrics = self.update(experience, minibatches, step)
        self.ppo_step = step
        # 5. Report, and adapt the penalty's coefficient.
        metrics |= rollout_metrics(experience, rollouts, scores, self.ppo.whiten_rewards) | spread
        metrics["ppo/kl_coef"] = self.kl.coef
        if rollouts.logprobs is not None and "ppo/first_log_ratio" in metrics:  # captured ones are the old ones
            metrics.setdefault("ppo/sampling_gap", metrics["ppo/first_log_ratio"])
        metrics["ppo/rollouts_per_second"] = len(batch) * samples / (time.perf_counter() - started)
        kl = float(self.reference.distance(metrics) * metrics["ppo/response_tokens"])
        if math.isfinite(kl):
            self.kl.update(kl)
        self.emit(metrics | self.take_timings(), step, bar=["ppo/reward", "ppo/response_tokens"])
        for dashboard in self.dashboards:
            dashboard.log_histograms(scores, self.ratio_counts, LARGEST_RATIO, step)

    def split_microbatches(self, batch: Sequences, minibatches: Sequence[Tensor]) -> list[Minibatch]:
        """Each minibatch in micro-batches: rows of similar length, within the budget of tokens."""
        split = []
        for rows in minibatches:
            if self.ppo.accumulation == "as_published":
                split.append(list(rows.split(self.ppo.published_rows)))
            else:
                split.append([rows[group] for group in self.microbatches(batch.rows(rows))])
        return number_microbatches(split)

    def greedy_rollouts(self, prompts: Sequence[str], step: int) -> Rollouts | None:
        """The greedy answer to each prompt, if the advantages are measured against it."""
        if self.config.advantages.baseline != "greedy":
            return None
        stream = self.stream(own_stream("greedy"), step)
        return rollout(
            self.engine, self.roles, "policy", self.tokenizer, prompts, self.config.generation, stream, temperature=0.0
        )

    def greedy_scores(self, greedy: Rollouts) -> Float[Tensor, "prompts"]:
        """The scores of greedy answers in the units of those of the rollouts, whose moments they do not change."""
        return self.normalizer.normalized(totals(self.scorer(greedy))) - self.ppo.missing_eos_penalty * ~greedy.ended

    def make_experience(
        self,
        rollouts: Rollouts,
        scores: Float[Tensor, "batch"],
        minibatches: Sequence[Minibatch],
        step: int,
        greedy_scores: Float[Tensor, "batch"] | None = None,
    ) -> Experience:
        """What the update learns from: see `ExperienceMaker`."""
        maker = ExperienceMaker(
            self.config, self.roles, self.passes, self.divergence, self.placement, self.captured_are_old, self.estimator
        )
        return maker.make(rollouts, scores, minibatches, step, self.kl.coef, greedy_scores)

    # -- the update ----------------------------------------------------------------------------------------------------

    def update(self, experience: Experience, minibatches: Sequence[Minibatch], step: int) -> dict[str, Any]:
        """All epochs over a rollout batch; the metrics are means over the tokens of all updates made."""
        norms: list[Tensor] = []
        totals: dict[str, Tensor] = {}
        tokens = torch.zeros((), dtype=torch.long, device=experience.mask.device)
        skipped: list[tuple[str, Tensor]] = []
        metrics: dict[str, Any] = {"ppo/lr": self.current_lr}
        histogram, more = bool(self.dashboards), terms_of(self.config)
        losses = Losses(self.config, self.roles, self.passes, self.divergence, self.placement, histogram, more)
        for number, parts in enumerate(self.all_epochs(minibatches, step)):
            rows = torch.cat([part.rows for part in parts])
            count = int(experience.sequences.response_lengths[rows].sum())
            result = self.accumulate(
                [*parts, *(self.mix.parts(self.passes, step, number, count) if self.mix else [])],
                lambda part: losses.terms(experience, part, step),
                count,
                clip_each=self.ppo.accumulation == "as_published",
            )
            if result.skip_reason == KL_EARLY_STOP:
                metrics["ppo/stopped_at_kl"] = result.sums["approx_kl"] / result.count
                break
            if result.skip_reason:
                skipped.append((result.skip_reason, rows))
                continue
            if not norms:
                metrics["ppo/first_ratio"] = result.sums["ratio"] / result.count
                metrics["ppo/first_log_ratio"] = result.sums["log_ratio"] / result.count
            norms.append(result.grad_norm)
            tokens = tokens + result.count
            for key, value in result.sums.items():
                totals[key] = totals[key] + value if key in totals else value
        self.advance_schedule()
        if skipped:
            metrics[SKIPPED] = len(skipped)
            reason, rows = skipped[0]
            self.guards.save_batch(step, experience.tensors() | {"skipped_rows": rows}, reason)
        if norms:
            metrics["ppo/grad_norm"] = torch.stack(norms).mean()
        self.ratio_counts = totals.pop("ratio_counts", None)
        logged = totals.keys() - {"loss", "log_ratio"}
        return metrics | {f"ppo/{key}": value / tokens for key, value in totals.items() if key in logged}

    def all_epochs(self, minibatches: Sequence[Minibatch], step: int) -> Iterator[list[Microbatch]]:
        """The micro-batches of each optimiser step, over all epochs."""
        order = generator(self.config.seed, "epochs", step)
        for _ in range(self.ppo.epochs):
            for i in torch.randperm(len(minibatches), generator=order).tolist():
                yield from self.optimizer_steps(minibatches[i])

    def optimizer_steps(self, minibatch: Minibatch) -> list[list[Microbatch]]:
        """The micro-batches of each optimiser step of a minibatch: all of them in a single step.

        The published code (alpaca_farm_lora at 4843f6b) instead takes a step per 16 rows, back-propagated as many times
        as there are such parts in a minibatch, with a clip after each; `ppo=as_published` does so too.
        """
        if self.ppo.accumulation == "exact":
            return [minibatch]
        return [[part] * (self.ppo.minibatch_size // self.ppo.published_rows) for part in minibatch]

    def skip_reason(self, norm: Tensor, sums: Mapping[str, Tensor], count: Tensor | int) -> str:
        """Also skip once the KL from the sampling policy is above 1.5 · `target_kl` (as Stable-Baselines3 does)."""
        target = self.ppo.target_kl
        if target is None:
            return super().skip_reason(norm, sums, count)
        loss = sums["loss"]
        numbers = torch.stack([loss, norm.to(loss), (sums["approx_kl"] / count).to(loss)]).tolist()
        return self.guards.skip_reason(*numbers[:2]) or (KL_EARLY_STOP if numbers[2] > 1.5 * target else "")

    # -- resuming ------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what Lightning does not know of."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["ppo"] = {
            "step": self.ppo_step,
            "kl_coef": self.kl.coef,
            "scores": self.normalizer.state_dict(),
            "reference": self.reference.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue where the checkpoint was made."""
        super().on_load_checkpoint(checkpoint)
        self.ppo_step, self.kl.coef = checkpoint["ppo"]["step"], checkpoint["ppo"]["kl_coef"]
        self.normalizer.load_state_dict(checkpoint["ppo"]["scores"])
        self.reference.load_state_dict(checkpoint["ppo"].get("reference", {}))
