"""A toy policy whose every response is enumerated, so that expectations over responses are sums without sampling."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from rlhf import ppo
from rlhf.placement import Placement

EOS, VOCABULARY, LONGEST = 0, 3, 3
Estimator = Callable[[Tensor, Tensor], Tensor]


def _responses() -> list[tuple[int, ...]]:
    """All responses: they end with EOS, or are cut at `LONGEST` tokens."""
    found = set()
    for tokens in product(range(VOCABULARY), repeat=LONGEST):
        found.add(tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens)
    return sorted(found)


RESPONSES = _responses()
STATES = sorted({response[:t] for response in RESPONSES for t in range(len(response))})
MASK = torch.tensor([[t < len(response) for t in range(LONGEST)] for response in RESPONSES])
TOKENS = torch.tensor([[*response, *[EOS] * (LONGEST - len(response))] for response in RESPONSES])
AT = torch.tensor([[STATES.index(r[:t]) if t < len(r) else 0 for t in range(LONGEST)] for r in RESPONSES])


def logits(seed: int) -> Tensor:
    """The logits of a policy, [states, vocabulary]."""
    return torch.randn(len(STATES), VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def logprobs(policy: Tensor) -> Tensor:
    """Log-probabilities of the tokens of all responses, [responses, time]."""
    return policy.log_softmax(-1)[AT, TOKENS].where(MASK, 0.0)


def probabilities(policy: Tensor) -> Tensor:
    """The probability of each response."""
    return logprobs(policy).sum(1).exp()


@dataclass(frozen=True)
class Toy:
    """The policy π, the one that sampled and the reference, as logits; `exact` estimators take logits."""

    policy: Tensor
    sampler: Tensor
    reference: Tensor
    estimator: Estimator
    exact: bool = False

    def penalty(self, policy: Tensor) -> Tensor:
        """The penalty on each token of all responses."""
        if self.exact:
            return self._exact(policy)[AT].where(MASK, 0.0)
        return self.estimator(logprobs(policy), logprobs(self.reference)).where(MASK, 0.0)

    def updates(self, placement: Placement, scores: Tensor | None = None, **settings: Any) -> Tensor:
        """The expected gradient of PPO's losses, not clipped, at β = 1; values are arbitrary, being but a baseline.

        Settings are `gamma`, `whiten_rewards` and `whiten_advantages`.
        """
        policy = self.policy.clone().requires_grad_()
        scores = torch.zeros(len(RESPONSES), dtype=torch.double) if scores is None else scores
        advantages, weight = self.advantages(placement, scores, **settings)
        old, new = logprobs(self.sampler), logprobs(policy)
        losses = ppo.policy_losses(new, old, advantages, 1e9)
        if placement.loss and self.exact:
            losses = losses + weight * self.penalty(policy)
        elif placement.loss:
            flat = (x[MASK] for x in (new, old, logprobs(self.reference)))
            penalty = placement.sampled_losses(self.estimator, *flat)
            losses = losses.masked_scatter(MASK, losses[MASK] + weight * penalty)
        return self._gradient(probabilities(self.sampler) @ losses.where(MASK, 0.0).sum(1), policy)

    def advantages(
        self,
        placement: Placement,
        scores: Tensor,
        gamma: float = 1.0,
        whiten_rewards: bool = False,
        whiten_advantages: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Advantages and the weight of a penalty in the loss, as `ExperienceMaker.make` computes them.

        Whitening is over a batch with `copies` of each response: with a sampler of equal probabilities those are in
        proportion to the probabilities, so that means over the batch are expectations.
        """
        copies, weight = VOCABULARY ** (LONGEST - MASK.sum(1)), torch.ones((), dtype=torch.double)
        mask = MASK.repeat_interleave(copies, 0)
        values = logits(9).logsumexp(-1)[AT].where(MASK, 0.0)
        rewards = ppo.shape_rewards(scores, self.penalty(self.sampler), MASK, 1.0 if placement.reward else 0.0)
        rewards, values = (x.repeat_interleave(copies, 0) for x in (rewards, values))
        if whiten_rewards:
            weight = weight * ppo.whitening_scale(rewards, mask)
            rewards = ppo.whiten(rewards, mask, keep_mean=True)
        advantages, _ = ppo.gae(rewards, values, mask, gamma, 1.0)
        if whiten_advantages:
            weight = weight * ppo.whitening_scale(advantages, mask)
            advantages = ppo.whiten(advantages, mask)
        return advantages[copies.cumsum(0) - 1], weight

    def of_responses(self) -> Tensor:
        """The gradient of E[Σ d_t] over the present policy's responses."""
        policy = self.policy.clone().requires_grad_()
        return self._gradient(probabilities(policy) @ self.penalty(policy).sum(1), policy)

    def of_states(self, omitted: bool = False) -> Tensor:
        """The gradient of the mean of d over the present policy's tokens, in the states that the sampler visits.

        `omitted` leaves the part E[∇d], which a reward omits.
        """
        policy = self.policy.clone().requires_grad_()
        if self.exact:
            per_state = self._exact(policy)
        else:
            mine, theirs = policy.log_softmax(-1), self.reference.log_softmax(-1)
            probs = mine.exp().detach() if omitted else mine.exp()
            per_state = (probs * self.estimator(mine, theirs)).sum(-1)
        visited = probabilities(self.sampler) @ per_state[AT].where(MASK, 0.0).sum(1)
        return self._gradient(visited, policy)

    def _exact(self, policy: Tensor) -> Tensor:
        return self.estimator(policy[None], self.reference[None])[0].double()  # computed in float32

    @staticmethod
    def _gradient(mean: Tensor, policy: Tensor) -> Tensor:
        found = torch.autograd.grad(mean, policy, allow_unused=True)[0]
        return torch.zeros_like(policy) if found is None else found
