"""PPO on a shared base, as in Sun, Gupta & Iyyer 2023: rollouts, penalised rewards, clipped updates."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf import ppo
from rlhf.distributed import collectives
from rlhf.divergence import bregman
from rlhf.guards import Guards
from rlhf.guards.signs import SKIPPED, repetition
from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences
from rlhf.rollout.engine import Engine
from rlhf.rollout.sample import Rollouts, in_float32, rollout, serve_as_old
from rlhf.seeding import generator, mixed_seed
from rlhf.settings import Settings
from rlhf.stages.evaluation import Evaluator, PolicyEvaluation
from rlhf.stages.experience import (
    Divergence,
    Experience,
    by_rows,
    exact_divergence,
    logprobs_of,
    reference_states,
    replayed_dropout,
    score_exact,
    score_logprobs,
    score_states,
    score_values,
)
from rlhf.tracking.dashboards import LARGEST_RATIO, RATIO_BINS

FAR = "KL"  # an update refused because the policy has gone far enough from the one that sampled


def own_stream(purpose: str) -> str:
    """The name of a random stream that each process has for itself."""
    return f"{purpose} of process {collectives.rank()}" if collectives.rank() else purpose


class PPO(PolicyEvaluation):
    """One training step is one rollout batch, `epochs` passes over it in minibatches, each one optimiser step.

    Rows are dealt into minibatches and micro-batches once per rollout batch; epochs visit the minibatches in a fresh
    order. Of several processes each answers its share of the prompts and has its share of every minibatch; means over
    the batch are over all of it. `scorer` gives a number per rollout, `evaluator` the metrics and a record per answer.
    Everything random is drawn from (seed, purpose, step), so a run continues from any step as if it had never stopped.
    """

    def __init__(
        self,
        settings: Settings,
        roles: Roles,
        tokenizer: PreTrainedTokenizerBase,
        engine: Engine,
        scorer: Callable[[Rollouts], Float[Tensor, " batch"]],
        divergence: Divergence,
        kl: ppo.FixedKL | ppo.AdaptiveKL,
        evaluator: Evaluator,
        samples: Path,
    ):
        lr = settings.ppo.lr if settings.lora.r else settings.ppo.lr_full
        super().__init__(dataclasses.replace(settings.ppo, lr=lr), settings.ppo.steps)
        self.all, self.ppo = settings, settings.ppo
        self.roles, self.tokenizer, self.engine = roles, tokenizer, engine
        self.scorer, self.divergence, self.kl, self.evaluator = scorer, divergence, kl, evaluator
        self.samples = samples
        exact = in_float32(roles) and settings.quantization is None
        self.guards = Guards(settings.guards.at_precision(exact), samples.parent)
        self.normalizer = ppo.ScoreNormalizer(
            self.ppo.score_normalization, self.ppo.score_clip, collectives.all_reduce_sum
        )
        self.ppo_step = 0
        self.dropout = settings.lora.r > 0 and settings.lora.dropout > 0
        self.captured_are_old = serve_as_old(settings.generation, roles)
        self.shared_trunk = roles.table["value"] == roles.table["policy"]
        self.exact = settings.divergence.input == "logits"
        self.last_evaluation: dict[str, float] = {}
        self.ratio_counts: Tensor | None = None

    @property
    def steps_done(self) -> int:
        """Rollout batches finished so far."""
        return self.ppo_step

    def training_step(self, batch: list[str], index: int) -> None:
        """Roll out, score, update, report."""
        started = time.perf_counter()
        step = self.ppo_step + 1
        prompts, shares = self.deal(batch, step)
        self.roles.eval()
        with self.timed("generate"):
            rollouts = rollout(
                self.engine,
                self.roles,
                "policy",
                self.tokenizer,
                prompts,
                self.all.generation,
                self.stream(own_stream("rollout"), step),
            )
        minibatches = self.divide(rollouts.sequences, shares)
        with self.timed("score"):
            scores = self.normalizer(self.scorer(rollouts)) - self.ppo.missing_eos_penalty * ~rollouts.ended
            experience = self.assess(rollouts, scores, minibatches, step)
        self.roles.train()
        with self.timed("update"):
            metrics = self.update(experience, minibatches, step)
        self.ppo_step = step
        metrics |= self.describe(experience, rollouts, scores)
        if rollouts.logprobs is not None and "ppo/first_log_ratio" in metrics:  # captured ones are the old ones
            metrics.setdefault("ppo/sampling_gap", metrics["ppo/first_log_ratio"])
        metrics["ppo/rollouts_per_second"] = len(batch) / (time.perf_counter() - started)
        kl = float(metrics.get("ppo/k1", math.nan) * metrics["ppo/response_tokens"])
        if math.isfinite(kl):
            self.kl.update(kl)
        self.emit(metrics | self.take_timings(), step, bar=["ppo/reward", "ppo/response_tokens"])
        for dashboard in self.dashboards:
            dashboard.log_histograms(scores, self.ratio_counts, step)

    def deal(self, batch: Sequence[str], step: int) -> tuple[list[str], list[Tensor]]:
        """The prompts of this process, and which of them are in each minibatch: dealt at random, as even as can be."""
        order = torch.randperm(len(batch), generator=generator(self.all.seed, "deal", step))
        shares = [rows[collectives.rank() :: collectives.size()] for rows in order.split(self.ppo.minibatch_size)]
        own = torch.cat(shares).sort().values
        return [batch[row] for row in own.tolist()], [torch.searchsorted(own, share.contiguous()) for share in shares]

    def divide(self, batch: Sequences, shares: Sequence[Tensor]) -> list[list[list[int]]]:
        """The rows of each minibatch in micro-batches of similar length."""
        minibatches = []
        for rows in shares:
            rows = rows.to(batch.ids.device)
            if self.ppo.accumulation == "as_published":
                minibatches.append([part.tolist() for part in rows.split(self.ppo.published_rows)])
            else:
                groups = self.microbatches(batch.rows(rows))
                minibatches.append([rows[group].tolist() for group in groups])
        return minibatches

    def optimizer_steps(self, parts: list[Any]) -> list[list[Any]]:
        """What goes into each optimiser step of a minibatch: all of it, together.

        The published code (alpaca_farm_lora at 4843f6b) instead takes a step per 16 rows, back-propagated as many times
        as there are such parts in a minibatch, with a clip after each; `ppo=as_published` does so too.
        """
        if self.ppo.accumulation == "exact":
            return [parts]
        return [[part] * (self.ppo.minibatch_size // self.ppo.published_rows) for part in parts]

    @torch.no_grad()
    def assess(
        self, rollouts: Rollouts, scores: Float[Tensor, "batch"], minibatches: list[list[list[int]]], step: int
    ) -> Experience:
        """Old log-probs and values, reference log-probs where needed, penalty, rewards, advantages.

        An exact divergence D_t depends on the state alone, so as a reward it says which *states* to avoid and nothing
        of the action taken there. The gradient of −β E[Σ D_t] has a second part, −β E[Σ ∇D_t] at the states visited,
        which `losses` adds in the units of the advantages. A penalty d on the sampled token has such a part too,
        −β E[Σ ∇d], and it is left out: it is 0 for k1 (E[∇δ] = 0) and for no other (docs/divergences.md).

        With LoRA dropout the update's passes have masks and the sampling had none. What the update compares with its
        own (ratios, value clip) is replayed under its masks; what says how the sampling policy did (penalty, KL,
        advantages, returns) is of the policy and the value function without dropout.
        """
        batch, mask, budget = rollouts.sequences, rollouts.mask, self.ppo.microbatch_tokens
        temperature = self.all.generation.temperature
        values = rollouts.values if self.captured_are_old else None
        if values is None:
            values = score_values(self.roles, batch, budget)
        old_logprobs, old_values = rollouts.logprobs, values
        if self.dropout:
            old_logprobs, old_values = self.replay(batch, minibatches, step)
        elif old_logprobs is None or not self.captured_are_old:
            old_logprobs = self.old_logprobs(batch, minibatches)
        ref_logprobs, states, sampled = None, None, None
        if self.exact:
            states = reference_states(self.roles, batch, budget)
            ref_logprobs = score_states(self.roles, batch, states, temperature)
            penalty = score_exact(self.roles, batch, budget, temperature, self.divergence, states)
        else:
            needed = self.all.divergence.input == "logprobs"
            if needed or step % self.ppo.yardstick_every == 0:
                ref_logprobs = score_logprobs(self.roles, "reference", batch, budget, temperature)
            penalty = torch.zeros_like(old_logprobs)
        if ref_logprobs is not None:
            sampled = self.sampled_logprobs(rollouts, old_logprobs)
            if self.all.divergence.input == "logprobs":
                penalty = torch.where(mask, self.divergence(sampled, ref_logprobs), 0.0)
        rewards = ppo.shape_rewards(scores, penalty, mask, self.kl.coef)
        total = collectives.all_reduce_sum
        shaped = ppo.whiten(rewards, mask, keep_mean=True, total=total) if self.ppo.whiten_rewards else rewards
        advantages, returns = ppo.gae(shaped, values, mask, self.ppo.gamma, self.ppo.lam)
        weight = self.kl.coef * (ppo.whitening_scale(rewards, mask, total) if self.ppo.whiten_rewards else 1.0)
        if self.ppo.whiten_advantages:
            weight = weight * ppo.whitening_scale(advantages, mask, total)
            advantages = ppo.whiten(advantages, mask, total=total)
        return Experience(
            batch, mask, old_logprobs, old_values, values, rewards, penalty, advantages, returns, ref_logprobs, states,
            weight, sampled, self.sampling_gap(rollouts, old_logprobs, minibatches),
        )  # fmt: skip

    def old_logprobs(self, batch: Sequences, minibatches: list[list[list[int]]]) -> Tensor:
        """Score the sampled tokens at the very shapes of the update, without dropout."""
        groups = [group for minibatch in minibatches for group in minibatch]
        temperature = self.all.generation.temperature
        return by_rows(batch, groups, lambda _, part: logprobs_of(self.roles, "policy", part, temperature))

    def replay(self, batch: Sequences, minibatches: list[list[list[int]]], step: int) -> tuple[Tensor, Tensor]:
        """Log-probs of the sampled tokens and values at the very shapes and dropout masks of the update."""
        groups = [group for minibatch in minibatches for group in minibatch]
        values: list[Tensor] = []

        def passes(number: int, part: Sequences) -> Tensor:
            states, value_states = self.update_states(part, number, step)
            values.append(self.roles.heads["value"](value_states))
            return self.roles.token_stats("policy", states, part.target_ids, self.all.generation.temperature).logprobs

        self.roles.train()
        logprobs = by_rows(batch, groups, passes)
        self.roles.eval()
        return logprobs, by_rows(batch, groups, lambda number, _: values[number])

    def update_states(self, part: Sequences, number: int, step: int) -> tuple[Tensor, Tensor]:
        """The hidden states of policy and value in the update, under the micro-batch's dropout masks."""
        with self.masks_of(step, number):
            states = self.roles.states("policy", part, part.predicting)
            return states, states if self.shared_trunk else self.roles.states("value", part, part.predicting)

    def sampled_logprobs(self, rollouts: Rollouts, old_logprobs: Tensor) -> Tensor:
        """Of the policy that sampled, without dropout; where the engine told none this takes a pass of its own."""
        if not self.dropout:
            return old_logprobs
        if rollouts.logprobs is not None:
            return rollouts.logprobs
        budget, temperature = self.ppo.microbatch_tokens, self.all.generation.temperature
        return score_logprobs(self.roles, "policy", rollouts.sequences, budget, temperature)

    def sampling_gap(
        self, rollouts: Rollouts, old_logprobs: Tensor, minibatches: list[list[list[int]]]
    ) -> Tensor | None:
        """Mean |log π_sampled − log π_scored| per token, from what the engine captured and what was scored again.

        None where the engine told nothing, or where nothing was scored again: then `update` compares in its first
        minibatch. Replayed log-probs are of another function than the sampler's, so with dropout one micro-batch is
        scored without it: a small part of a pass.
        """
        captured, mask = rollouts.logprobs, rollouts.mask
        if captured is None or (self.captured_are_old and not self.dropout):
            return None
        scored = old_logprobs
        if self.dropout:
            scored, mask = captured.clone(), torch.zeros_like(mask)
            for group in minibatches[0][:1]:
                rows = torch.tensor(group, device=mask.device)
                mask[rows] = rollouts.mask[rows]
                own = self.old_logprobs(rollouts.sequences.rows(rows), [[list(range(len(group)))]])
                scored[rows, : own.shape[1]] = own
        return ppo.masked_mean((captured - scored).abs(), mask, collectives.all_reduce_sum)

    def masks_of(self, step: int, number: int) -> Any:
        """The dropout masks of one micro-batch of a rollout batch (a context)."""
        seed = mixed_seed(self.all.seed, own_stream(f"dropout {number}"), step)
        return replayed_dropout(seed, self.dropout, self.roles.device)

    def update(self, experience: Experience, minibatches: list[list[list[int]]], step: int) -> dict[str, Any]:
        """All epochs over a rollout batch."""
        device = experience.mask.device
        parts, number = [], 0
        for minibatch in minibatches:
            parts.append([(number + i, torch.tensor(rows, device=device)) for i, rows in enumerate(minibatch)])
            number += len(minibatch)
        norms: list[Tensor] = []
        totals: dict[str, Tensor] = {}
        tokens = torch.zeros((), dtype=torch.long, device=device)
        refusals: list[tuple[str, Tensor]] = []
        metrics: dict[str, Any] = {"ppo/lr": self.current_lr}
        for taken in self.passes(parts, step):
            dealt = torch.cat([rows for _, rows in taken])
            result = self.accumulate(
                taken,
                lambda part: self.losses(experience, part[0], part[1], step),
                experience.mask[dealt].sum(),
                clip_each=self.ppo.accumulation == "as_published",
            )
            if result.refused == FAR:
                metrics["ppo/stopped_at_kl"] = result.sums["approx_kl"] / result.over
                break
            if result.refused:
                refusals.append((result.refused, dealt))
                continue
            if not norms:
                metrics["ppo/first_ratio"] = result.sums["ratio"] / result.over
                metrics["ppo/first_log_ratio"] = result.sums["log_ratio"] / result.over
            norms.append(result.grad_norm)
            tokens = tokens + result.over
            for key, value in result.sums.items():
                totals[key] = totals[key] + value if key in totals else value
        self.advance_schedule()
        if refusals:
            metrics[SKIPPED] = len(refusals)
            reason, rows = refusals[0]
            self.guards.save(step, experience.tensors() | {"skipped_rows": rows}, reason)
        if norms:
            metrics["ppo/grad_norm"] = torch.stack(norms).mean()
        self.ratio_counts = totals.pop("ratio_counts", None)
        logged = totals.keys() - {"loss", "log_ratio"}
        return metrics | {f"ppo/{key}": value / tokens for key, value in totals.items() if key in logged}

    def passes(self, parts: list[Any], step: int) -> Iterator[list[Any]]:
        """What goes into each optimiser step, over all epochs."""
        order = generator(self.all.seed, "epochs", step)
        for _ in range(self.ppo.epochs):
            for i in torch.randperm(len(parts), generator=order).tolist():
                yield from self.optimizer_steps(parts[i])

    def refusal(self, norm: Tensor, sums: Mapping[str, Tensor], count: Tensor | int) -> str:
        """Also refuse to go on once the KL from the sampling policy is above 1.5 · `target_kl` (Stable-Baselines3)."""
        target = self.ppo.target_kl
        if target is None:
            return super().refusal(norm, sums, count)
        loss = sums["loss"]
        numbers = torch.stack([loss, norm.to(loss), (sums["approx_kl"] / count).to(loss)]).tolist()
        return self.guards.refusal(*numbers[:2]) or (FAR if numbers[2] > 1.5 * target else "")

    def losses(self, experience: Experience, number: int, rows: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss of one micro-batch, and sums to report.

        An exact divergence is that of the policy without dropout, as in the reward: with masks its minimum would not be
        at the reference but where masks matter least, a weight penalty that nobody asked for. Under dropout this takes
        a pass of its own, whose activations are kept whole.
        """
        part = experience.sequences.rows(rows)
        mask, temperature = part.response_mask, self.all.generation.temperature

        def flat(x: Tensor) -> Tensor:
            return x[rows, : mask.shape[1]][mask]

        states, value_states = self.update_states(part, number, step)
        stats = self.roles.token_stats("policy", states, part.target_ids, temperature, entropy=True)
        values = self.roles.heads["value"](value_states)
        old_logprobs, advantages = flat(experience.old_logprobs), flat(experience.advantages)
        penalised: Tensor | float = 0.0
        if experience.ref_hidden is not None:
            if self.dropout:
                self.roles.eval()
                states = self.roles.states("policy", part, part.predicting)
                self.roles.train()
            reference = torch.cat([experience.ref_hidden[row] for row in rows.tolist()])
            exact = exact_divergence(self.roles, states, reference, temperature, self.divergence)
            penalised = experience.divergence_weight * exact.sum()
        policy_loss = ppo.policy_losses(stats.logprobs, old_logprobs, advantages, self.ppo.clip_range).sum()
        value_loss = ppo.value_losses(
            values, flat(experience.old_values), flat(experience.returns), self.ppo.value_clip_range
        ).sum()
        with torch.no_grad():
            change = stats.logprobs - old_logprobs
            ratio = change.exp()
            sums = {
                "policy_loss": policy_loss,
                "value_loss": value_loss,
                "entropy": stats.entropy.sum(),  # type: ignore[union-attr]
                "ratio": ratio.sum(),
                "log_ratio": change.abs().sum(),
                "approx_kl": (change.expm1() - change).sum(),  # k3, of the sampling policy from the new one
                "clip_fraction": ((ratio - 1).abs() > self.ppo.clip_range).sum(),
            }
            if self.dashboards:
                sums["ratio_counts"] = torch.histc(ratio.clamp(max=LARGEST_RATIO), RATIO_BINS, 0, LARGEST_RATIO)
        return policy_loss + self.ppo.value_coef * value_loss + penalised, sums

    def describe(self, experience: Experience, rollouts: Rollouts, scores: Tensor) -> dict[str, Any]:
        """The metrics of a rollout batch: means over response tokens or responses, of all processes."""
        mask, total = experience.mask, collectives.all_reduce_sum
        number = total(torch.tensor(len(scores), device=mask.device))

        def mean(x: Tensor) -> Tensor:
            return total(x.sum()) / number

        repeated = torch.tensor(repetition(rollouts.sequences.responses()) * len(scores), device=mask.device)
        metrics = {
            "ppo/reward": mean(scores),
            "ppo/shaped_reward": mean(experience.rewards),
            "ppo/penalty": ppo.masked_mean(experience.penalty, mask, total),
            "ppo/kl_coef": self.kl.coef,
            "ppo/explained_variance": ppo.explained_variance(experience.values, experience.returns, mask, total),
            "ppo/response_tokens": mean(mask),
            "ppo/missing_eos": 1 - mean(rollouts.ended),
            "ppo/repetition": mean(repeated),
        }
        if self.ppo.whiten_rewards:
            metrics["ppo/whitening_length_term"] = ppo.whitening_length_term(experience.rewards, mask, total)
        if experience.sampling_gap is not None:
            metrics["ppo/sampling_gap"] = experience.sampling_gap
        sampled, reference = experience.sampled_logprobs, experience.ref_logprobs
        if sampled is not None and reference is not None:
            k1, k3 = sampled - reference, bregman(sampled, reference)
            metrics["ppo/k1"] = ppo.masked_mean(k1, mask, total)
            metrics["ppo/k3"] = ppo.masked_mean(k3, mask, total)
        return metrics

    # -- resuming ----------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What Lightning does not know of."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["ppo"] = {
            "step": self.ppo_step,
            "kl_coef": self.kl.coef,
            "scores": self.normalizer.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue where the checkpoint was made."""
        super().on_load_checkpoint(checkpoint)
        self.ppo_step, self.kl.coef = checkpoint["ppo"]["step"], checkpoint["ppo"]["kl_coef"]
        self.normalizer.load_state_dict(checkpoint["ppo"]["scores"])
