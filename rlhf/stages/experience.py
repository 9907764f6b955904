"""What PPO knows about a rollout batch before it updates, and how it is computed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf import ppo
from rlhf.advantages import Estimator, RewardedBatch
from rlhf.aggregation import response_weights
from rlhf.distributed import collectives
from rlhf.divergence import Divergence, bregman
from rlhf.evaluation.repetition import repeated_ngrams
from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences, send
from rlhf.placement import Placement
from rlhf.rollout.sample import Rollouts
from rlhf.settings import Settings
from rlhf.stages.minibatches import Microbatch, Minibatch
from rlhf.stages.passes import (
    UpdatePasses,
    compute_divergence,
    compute_logprobs,
    compute_reference_logprobs,
    compute_reference_states,
    compute_values,
)


@dataclass
class Experience:
    """A rollout batch ready for updates; all [batch, response], 0 on padding.

    `old_logprobs` and `old_values` are what the update's ratios and value clip start from, under the update's dropout
    masks. `sampled_logprobs` (None where nothing needs them) and `values` are without dropout, like the sampling:
    penalty and KL are computed from the former, advantages and returns from the latter. `sampling_gap` is the mean
    distance between captured and recomputed log-probs, where both are known by now. `rewards` are shaped but not
    whitened. `ref_logprobs` is None when there was no reference pass; it is of the SFT model, `moving_logprobs` of the
    penalty's reference where that is another (`rlhf.stages.reference`). `divergence_weight` is that of a penalty in the
    loss; if it is an exact divergence, `ref_hidden` holds the reference's hidden states (by row, [response, hidden]).
    Without a value function there are no values and returns. `token_weights` is None where all tokens count alike in
    the loss.
    """

    sequences: Sequences
    mask: Bool[Tensor, "batch response"]
    old_logprobs: Float[Tensor, "batch response"]
    old_values: Float[Tensor, "batch response"] | None
    values: Float[Tensor, "batch response"] | None
    rewards: Float[Tensor, "batch response"]
    penalty: Float[Tensor, "batch response"]
    advantages: Float[Tensor, "batch response"]
    returns: Float[Tensor, "batch response"] | None
    ref_logprobs: Float[Tensor, "batch response"] | None
    ref_hidden: list[Tensor] | None = None
    divergence_weight: Tensor | float = 0.0
    sampled_logprobs: Float[Tensor, "batch response"] | None = None
    sampling_gap: Tensor | None = None
    token_weights: Float[Tensor, "batch response"] | None = None
    moving_logprobs: Float[Tensor, "batch response"] | None = None

    @property
    def penalty_logprobs(self) -> Float[Tensor, "batch response"] | None:
        """Log-probs under the reference that the penalty measures from, which may be a moving one."""
        return self.ref_logprobs if self.moving_logprobs is None else self.moving_logprobs

    def flat(self, name: str, rows: Int[Tensor, "rows"]) -> Float[Tensor, "tokens"]:
        """The numbers of a tensor, by the name of its field, at the response tokens of some rows, row after row."""
        places = send(self.sequences.response_places(rows), self.mask.device)
        return getattr(self, name).flatten().index_select(0, places)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, to be saved and looked at elsewhere."""
        # copies: without dropout some are one and the same tensor, which safetensors would refuse
        own = {key: value.clone() for key, value in vars(self).items() if isinstance(value, Tensor)}
        return self.sequences.tensors() | own


@dataclass(frozen=True)
class ExperienceMaker:
    """Turns a rollout batch and its scores into an `Experience`: all that PPO computes before it updates.

    `captured_are_old` says whether the log-probs that the engine captured serve as the old ones as they are.
    """

    config: Settings
    roles: Roles
    passes: UpdatePasses
    divergence: Divergence
    placement: Placement
    captured_are_old: bool
    estimator: Estimator

    @torch.no_grad()
    def make(
        self,
        rollouts: Rollouts,
        scores: Float[Tensor, "batch"],
        minibatches: Sequence[Minibatch],
        step: int,
        kl_coef: float,
        greedy_scores: Float[Tensor, "batch"] | None = None,
    ) -> Experience:
        """All that the update learns from, in four steps; `kl_coef` is the penalty's coefficient β.

        `greedy_scores` are those of the greedy answers to the rows' prompts, if the estimator wants them.
        """
        config, batch, mask = self.config.ppo, rollouts.sequences, rollouts.mask
        all_reduce = collectives.all_reduce_sum
        # 1. Values and old log-probs.
        values, old_values, old_logprobs = self._old(rollouts, minibatches, step)
        # 2. The reference, and the penalty for being far from it.
        penalty, sampled, from_logprobs, ref_states = self._reference(rollouts, old_logprobs, step)
        ref_logprobs, moving_logprobs = self._yardstick(rollouts, from_logprobs)
        # 3. A reward per token, and from it advantages and returns.
        beta = kl_coef if self.placement.reward else 0.0
        rewards = ppo.shape_rewards(scores, penalty, mask, beta, rollouts.token_rewards)
        whitened = (
            ppo.whiten(rewards, mask, keep_mean=True, all_reduce=all_reduce) if config.whiten_rewards else rewards
        )
        prompts = torch.arange(len(scores), device=mask.device) // self.config.generation.samples_per_prompt
        advantages = self.estimator(
            RewardedBatch(whitened, mask, prompts, config.gamma, config.lam, values, greedy_scores)
        )
        returns = None if values is None else torch.where(mask, advantages + values, 0.0)
        # 4. The weight of a penalty in the loss: its coefficient, in the units of the advantages.
        weight = kl_coef * (ppo.whitening_scale(rewards, mask, all_reduce) if config.whiten_rewards else 1.0)
        if config.whiten_advantages:
            weight = weight * ppo.whitening_scale(advantages, mask, all_reduce)
            advantages = ppo.whiten(advantages, mask, all_reduce=all_reduce)
        return Experience(
            batch, mask, old_logprobs, old_values, values, rewards, penalty, advantages, returns, ref_logprobs,
            ref_states, weight, sampled, self._sampling_gap(rollouts, old_logprobs, minibatches),
            self._token_weights(batch, mask, minibatches), moving_logprobs,
        )  # fmt: skip

    def _old(
        self, rollouts: Rollouts, minibatches: Sequence[Minibatch], step: int
    ) -> tuple[Tensor | None, Tensor | None, Float[Tensor, "batch response"]]:
        """Values without dropout, old values (None without a value function) and old log-probs.

        With LoRA dropout the update's passes have masks and the sampling had none. What the update compares with its
        own results (ratios, value clip) is computed under its masks; what describes the sampling policy (penalty, KL,
        advantages, returns) comes from the policy and the value function without dropout.
        """
        batch = rollouts.sequences
        values = rollouts.values if self.captured_are_old else None
        if values is None and self.passes.has_value:
            values = compute_values(self.roles, batch, self.config.ppo.microbatch_tokens)
        if self.passes.dropout:
            old_logprobs, old_values = self.passes.replay(batch, minibatches, step)
            return values, old_values, old_logprobs
        if rollouts.logprobs is not None and self.captured_are_old:
            return values, values, rollouts.logprobs
        return values, values, self.passes.old_logprobs(batch, minibatches)

    def _reference(
        self, rollouts: Rollouts, old_logprobs: Float[Tensor, "batch response"], step: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None, list[Tensor] | None]:
        """Penalty, log-probs under the sampling policy and the reference (None if not needed), reference's states.

        An exact divergence D_t depends on the state alone, so as a reward it says which *states* to avoid and nothing
        about the action taken there. The gradient of −β E[Σ D_t] has a second part, −β E[Σ ∇D_t] at the states visited,
        which the loss of the update adds in the units of the advantages. A penalty d on the sampled token has such a
        part too, −β E[Σ ∇d], which is 0 for k1 (E[∇δ] = 0) and for no other. `kl.placement` says which parts are
        used (docs/divergences.md).
        """
        batch, roles, kind = rollouts.sequences, self.roles, self.config.divergence.input
        role = roles.penalty_reference
        budget, temperature = self.config.ppo.microbatch_tokens, self.config.generation.temperature
        penalty, states = torch.zeros_like(old_logprobs), None
        if kind == "logits":
            states = compute_reference_states(roles, batch, budget, role)
            reference = compute_reference_logprobs(roles, batch, states, temperature, role)
            penalty = compute_divergence(roles, batch, budget, temperature, self.divergence, states, role)
        elif kind == "logprobs" or step % self.config.ppo.reference_every == 0:
            reference = compute_logprobs(roles, role, batch, budget, temperature)
        else:
            return penalty, None, None, None
        sampled = self._sampled_logprobs(rollouts, old_logprobs)
        if kind == "logprobs":
            penalty = torch.where(rollouts.mask, self.divergence(sampled, reference), 0.0)
        return penalty, sampled, reference, states if self.placement.loss else None

    def _yardstick(self, rollouts: Rollouts, logprobs: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Log-probs of the SFT model, and of the penalty's reference if that is another: then in a pass of its own."""
        if logprobs is None or self.roles.penalty_reference == "reference":
            return logprobs, None
        budget, temperature = self.config.ppo.microbatch_tokens, self.config.generation.temperature
        return compute_logprobs(self.roles, "reference", rollouts.sequences, budget, temperature), logprobs

    def _sampled_logprobs(self, rollouts: Rollouts, old_logprobs: Tensor) -> Tensor:
        """Log-probs under the sampling policy, without dropout; a pass of its own where the engine captured none."""
        if not self.passes.dropout:
            return old_logprobs
        if rollouts.logprobs is not None:
            return rollouts.logprobs
        budget, temperature = self.config.ppo.microbatch_tokens, self.config.generation.temperature
        return compute_logprobs(self.roles, "policy", rollouts.sequences, budget, temperature)

    def _token_weights(
        self, batch: Sequences, mask: Bool[Tensor, "batch response"], minibatches: Sequence[Minibatch]
    ) -> Float[Tensor, "batch response"] | None:
        """The weight of each token's loss (`response_weights`); None if it is 1 for all."""
        kind, longest = self.config.ppo.loss_aggregation, self.config.generation.max_new_tokens
        if kind == "token_mean":
            return None
        weights = torch.zeros(len(batch), device=mask.device)
        for minibatch in minibatches:
            rows = torch.cat([part.rows for part in minibatch])
            lengths, there = send(batch.response_lengths[rows], mask.device), send(rows, mask.device)
            weights[there] = response_weights(kind, lengths, longest, collectives.all_reduce_sum)
        return torch.where(mask, weights[:, None], 0.0)

    def _sampling_gap(
        self, rollouts: Rollouts, old_logprobs: Tensor, minibatches: Sequence[Minibatch]
    ) -> Tensor | None:
        """Mean |log π_captured − log π_recomputed| per token.

        None where the engine captured nothing, or where nothing was recomputed: then the first minibatch of the update
        makes the comparison. With dropout, `old_logprobs` are of another function than the sampler's, so that one
        micro-batch is computed again without it: a small part of a pass.
        """
        captured, mask = rollouts.logprobs, rollouts.mask
        if captured is None or (self.captured_are_old and not self.passes.dropout):
            return None
        recomputed = old_logprobs
        if self.passes.dropout:
            recomputed, mask = captured.clone(), torch.zeros_like(mask)
            for _, rows in minibatches[0][:1]:
                single = [[Microbatch(0, torch.arange(len(rows)))]]
                own = self.passes.old_logprobs(rollouts.sequences.rows(rows), single)
                there = send(rows, mask.device)
                mask[there] = rollouts.mask[there]
                recomputed[there, : own.shape[1]] = own
        return ppo.masked_mean((captured - recomputed).abs(), mask, collectives.all_reduce_sum)


def rollout_metrics(
    experience: Experience, rollouts: Rollouts, scores: Float[Tensor, "batch"], whitened_rewards: bool
) -> dict[str, Tensor]:
    """The metrics of a rollout batch: means over the response tokens or the responses of all processes."""
    mask, all_reduce = experience.mask, collectives.all_reduce_sum
    count = all_reduce(torch.tensor(len(scores), device=mask.device))

    def mean(x: Tensor) -> Tensor:
        return all_reduce(x.sum()) / count

    # times their number, because `mean` divides by the rows of all processes
    repeated = torch.tensor(repeated_ngrams(rollouts.sequences.responses()) * len(scores), device=mask.device)
    metrics = {
        "ppo/reward": mean(scores),
        "ppo/shaped_reward": mean(experience.rewards),
        "ppo/penalty": ppo.masked_mean(experience.penalty, mask, all_reduce),
        "ppo/response_tokens": mean(mask),
        "ppo/missing_eos": 1 - mean(rollouts.ended),
        "ppo/repetition": mean(repeated),
    }
    if experience.values is not None and experience.returns is not None:
        metrics["ppo/explained_variance"] = ppo.explained_variance(
            experience.values, experience.returns, mask, all_reduce
        )
    if whitened_rewards:
        metrics["ppo/whitening_length_term"] = ppo.whitening_length_term(experience.rewards, mask, all_reduce)
    if experience.sampling_gap is not None:
        metrics["ppo/sampling_gap"] = experience.sampling_gap
    sampled, reference = experience.sampled_logprobs, experience.ref_logprobs
    if sampled is not None and reference is not None:
        k1, k3 = sampled - reference, bregman(sampled, reference)
        metrics["ppo/k1"] = ppo.masked_mean(k1, mask, all_reduce)
        metrics["ppo/k3"] = ppo.masked_mean(k3, mask, all_reduce)
    if sampled is not None and experience.moving_logprobs is not None:
        metrics["ppo/reference_k1"] = ppo.masked_mean(sampled - experience.moving_logprobs, mask, all_reduce)
    return metrics
