"""Further terms of the policy's loss: the entropy bonus, and functions of the user's own (`loss_terms`)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from hydra.utils import get_method
from jaxtyping import Float, Int
from torch import Tensor

from rlhf.models.heads import TokenStats
from rlhf.settings import Settings
from rlhf.stages.experience import Experience

ENTROPY = "entropy"  # the name of the term that `ppo.entropy_coef` adds


@dataclass(frozen=True)
class PolicyTokens:
    """What a loss term sees of a micro-batch: a number for each response token, row after row, all [tokens].

    Attributes:
        logprobs: of the sampled tokens under the policy that learns, in nats at the sampling temperature;
            differentiable.
        entropy: of that policy's distribution over the whole vocabulary, in nats; differentiable.
        old_logprobs: under the policy that sampled.
        ref_logprobs: under the reference; None at steps without a reference pass (`divergence=none`).
        advantages: as the policy's loss uses them.
    """

    logprobs: Float[Tensor, "tokens"]
    entropy: Float[Tensor, "tokens"]
    old_logprobs: Float[Tensor, "tokens"]
    ref_logprobs: Float[Tensor, "tokens"] | None
    advantages: Float[Tensor, "tokens"]


LossTerm = Callable[[PolicyTokens], Float[Tensor, "tokens"]]
WeightedTerm = tuple[float, LossTerm]


def negative_entropy(tokens: PolicyTokens) -> Float[Tensor, "tokens"]:
    """−H(π), whose minimum is the uniform distribution: the entropy bonus (Williams & Peng 1991; Mnih et al. 2016)."""
    return -tokens.entropy


def old_kl(tokens: PolicyTokens) -> Float[Tensor, "tokens"]:
    """k3 of KL(π_old ‖ π): PPO's other way of staying near the sampling policy (Schulman et al. 2017, section 4)."""
    change = tokens.logprobs - tokens.old_logprobs
    return change.expm1() - change


def terms_of(settings: Settings) -> dict[str, WeightedTerm]:
    """The terms that the settings ask for: name → coefficient and function."""
    bonus: dict[str, WeightedTerm] = {ENTROPY: (settings.ppo.entropy_coef, negative_entropy)}
    own = {name: (term.coef, get_method(term.function)) for name, term in settings.loss_terms.items()}
    return (bonus if settings.ppo.entropy_coef else {}) | own


def add_terms(
    terms: Mapping[str, WeightedTerm], stats: TokenStats, experience: Experience, rows: Int[Tensor, "rows"]
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The weighted sum of the terms over the response tokens of some rows; and each term's own sum, to report.

    Tokens are weighted as in the policy's loss (`ppo.loss_aggregation`).

    Raises:
        ValueError: a term is no number per token.
    """
    assert stats.entropy is not None
    reference = None if experience.ref_logprobs is None else experience.flat("ref_logprobs", rows)
    old, advantages = experience.flat("old_logprobs", rows), experience.flat("advantages", rows)
    tokens = PolicyTokens(stats.logprobs, stats.entropy, old, reference, advantages)
    weights = 1.0 if experience.token_weights is None else experience.flat("token_weights", rows)
    total, sums = torch.zeros((), device=old.device), {}
    for name, (coef, term) in terms.items():
        values = term(tokens)
        if values.shape != old.shape:
            raise ValueError(f"loss_terms.{name} returned shape {tuple(values.shape)} for {len(old)} tokens")
        total = total + coef * (values * weights).sum()
        if name != ENTROPY:  # which is reported anyway
            sums[f"loss_{name}"] = values.detach().sum()
    return total, sums
