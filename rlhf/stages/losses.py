"""PPO's losses on a micro-batch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf import ppo
from rlhf.aggregation import response_means
from rlhf.divergence import Divergence
from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences
from rlhf.placement import Placement
from rlhf.settings import Settings
from rlhf.stages.base import Term
from rlhf.stages.experience import Experience
from rlhf.stages.loss_terms import WeightedTerm, add_terms
from rlhf.stages.minibatches import Microbatch
from rlhf.stages.passes import UpdatePasses, exact_divergence
from rlhf.stages.pretraining import MixedPart

RATIO_BINS, LARGEST_RATIO = 64, 2.0  # of the ratios' histogram; larger ratios count in the last bin


@dataclass(frozen=True)
class Losses:
    """The losses of policy and value function, each summed over a micro-batch's response tokens.

    `histogram` says whether the ratios are counted for dashboards. `more` are further terms of the policy's loss.
    """

    config: Settings
    roles: Roles
    passes: UpdatePasses
    divergence: Divergence
    placement: Placement
    histogram: bool
    more: Mapping[str, WeightedTerm] = field(default_factory=dict)

    def terms(self, experience: Experience, part: Microbatch | MixedPart, step: int) -> Iterator[Term]:
        """The losses one after the other, with sums to report.

        They are one term where both read the same hidden states. Elsewhere the activations of one can be freed before
        those of the next are made; so can those of an exact divergence's own pass.
        """
        if isinstance(part, MixedPart):
            yield from part.terms(step)
            return
        sequences = experience.sequences.rows(part.rows)
        shared, exact = self.passes.shared_trunk, experience.ref_hidden is not None
        states = self.passes.states("policy", sequences, part.number, step)
        loss, sums = self.policy(experience, part.rows, sequences, states)
        if exact and not self.passes.dropout:
            loss = loss + self.exact_penalty(experience, part.rows, sequences, states)
        if shared:
            value_loss = self.value(experience, part.rows, states)
            loss, sums["value_loss"] = loss + self.config.ppo.value_coef * value_loss, value_loss
        yield loss, sums
        if exact and self.passes.dropout:
            yield self.exact_penalty(experience, part.rows, sequences), {}
        if self.passes.has_value and not shared:
            value_loss = self.value(experience, part.rows, self.passes.states("value", sequences, part.number, step))
            yield self.config.ppo.value_coef * value_loss, {"value_loss": value_loss}

    def policy(
        self,
        experience: Experience,
        rows: Int[Tensor, "rows"],
        sequences: Sequences,
        states: Float[Tensor, "tokens hidden"],
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """PPO's clipped objective, with a penalty on the sampled tokens if there is one, and sums to report."""
        config, temperature = self.config.ppo, self.config.generation.temperature
        high = config.clip_range if config.clip_range_high is None else config.clip_range_high
        targets, more = sequences.target_ids, bool(self.more)
        stats = self.roles.token_stats("policy", states, targets, temperature, entropy=True, entropy_grad=more)
        old_logprobs, advantages = experience.flat("old_logprobs", rows), experience.flat("advantages", rows)
        new, old = stats.logprobs, old_logprobs
        if config.ratio == "sequence":  # GSPO (Zheng et al. 2025): the geometric mean of the ratios of a response
            new, old = (response_means(x, sequences.response_lengths) for x in (new, old))
        losses = ppo.policy_losses(new, old, advantages, config.clip_range, high, config.dual_clip)
        loss = self.weighted_sum(experience, rows, losses)
        with torch.no_grad():
            change, ratio = stats.logprobs - old_logprobs, (new - old).exp()
            sums = {
                "policy_loss": loss,
                "entropy": stats.entropy.sum(),  # type: ignore[union-attr]
                "ratio": ratio.sum(),
                "log_ratio": change.abs().sum(),
                "approx_kl": (change.expm1() - change).sum(),  # k3, of the sampling policy from the new one
                "clip_fraction": ((1 - ratio > config.clip_range) | (ratio - 1 > high)).sum(),
            }
            if self.histogram:
                sums["ratio_counts"] = _count_ratios(ratio)
        if self.placement.loss and self.config.divergence.input == "logprobs":
            loss = loss + self.sampled_penalty(experience, rows, stats.logprobs)
        if self.more:
            added, values = add_terms(self.more, stats, experience, rows)
            loss, sums = loss + added, sums | values
        return loss, sums

    def weighted_sum(
        self, experience: Experience, rows: Int[Tensor, "rows"], losses: Float[Tensor, "tokens"]
    ) -> Float[Tensor, ""]:
        """The sum of the losses of these rows' tokens, weighted as `ppo.loss_aggregation` asks."""
        weights = None if experience.token_weights is None else experience.flat("token_weights", rows)
        return losses.sum() if weights is None else (losses * weights).sum()

    def value(
        self, experience: Experience, rows: Int[Tensor, "rows"], states: Float[Tensor, "tokens hidden"]
    ) -> Float[Tensor, ""]:
        """The clipped squared error of the value function."""
        values = self.roles.heads["value"](states)
        old_values, returns = experience.flat("old_values", rows), experience.flat("returns", rows)
        return ppo.value_losses(values, old_values, returns, self.config.ppo.value_clip_range).sum()

    def sampled_penalty(
        self, experience: Experience, rows: Int[Tensor, "rows"], logprobs: Float[Tensor, "tokens"]
    ) -> Float[Tensor, ""]:
        """The weighted estimator of the divergence on the sampled tokens, from the policy's log-probs of this update.

        With LoRA dropout they are those under its masks, as in PPO's ratio.
        """
        old_logprobs, reference = experience.flat("old_logprobs", rows), experience.flat("penalty_logprobs", rows)
        losses = self.placement.sampled_losses(self.divergence, logprobs, old_logprobs, reference)
        return experience.divergence_weight * self.weighted_sum(experience, rows, losses)

    def exact_penalty(
        self,
        experience: Experience,
        rows: Int[Tensor, "rows"],
        sequences: Sequences,
        states: Float[Tensor, "tokens hidden"] | None = None,
    ) -> Float[Tensor, ""]:
        """The weighted divergence of the policy from the reference over the whole vocabulary.

        It is that of the policy without dropout, as in the reward: with masks its minimum would not be at the reference
        but where masks matter least, which would act as an unintended weight penalty. `states` are those of the policy
        without dropout; if they are not given, they are computed in a pass of their own.
        """
        if states is None:
            self.roles.eval()
            states = self.roles.states("policy", sequences, sequences.predicting)
            self.roles.train()
        assert experience.ref_hidden is not None
        reference = torch.cat([experience.ref_hidden[row] for row in rows.tolist()])
        temperature = self.config.generation.temperature
        role = self.roles.penalty_reference
        exact = exact_divergence(self.roles, states, reference, temperature, self.divergence, role)
        return experience.divergence_weight * self.weighted_sum(experience, rows, exact)


def _count_ratios(ratio: Float[Tensor, "tokens"]) -> Float[Tensor, "bins"]:
    """The histogram of ratios (`torch.histc` has no deterministic kernel on a GPU; a count has one value)."""
    bins = (ratio.clamp(max=LARGEST_RATIO) * (RATIO_BINS / LARGEST_RATIO)).long().clamp(0, RATIO_BINS - 1)
    return torch.zeros(RATIO_BINS, device=ratio.device).scatter_add(0, bins, torch.ones_like(ratio))
