"""Where a penalty acts: in the reward, as a term of the loss, or in both (`kl.placement`).

With a penalty d_t per token, the gradient of its mean over responses has two parts,

    ∇ E[Σ d_t] = E[Σ_t ∇log π_t · Σ_{s ≥ t} d_s] + E[Σ ∇d_t].

A penalty in the reward is followed along the first part, one in the loss along the second, one in both along the sum.
docs/divergences.md has a table of what each combination is an unbiased gradient of.
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from rlhf.divergence import Divergence
from rlhf.errors import ConfigError
from rlhf.policy_settings import DivergenceSettings

PLACEMENTS = ("auto", "reward", "loss", "both")


@dataclass(frozen=True)
class Placement:
    """Whether a penalty is part of the reward and of the loss, and whether its loss term is importance-weighted."""

    reward: bool
    loss: bool
    importance_weight: bool = False

    @classmethod
    def of(cls, kl: Any, divergence: DivergenceSettings) -> "Placement":
        """What a controller of the coefficient (`conf/kl`) says; one that says nothing leaves it at `auto`.

        `auto` puts an estimator on the sampled token into the reward and an exact divergence into both.

        Raises:
            ConfigError: there is no such placement, or the divergence cannot be placed so.
        """
        chosen, weighted = getattr(kl, "placement", "auto"), getattr(kl, "importance_weight", False)
        if chosen not in PLACEMENTS:
            raise ConfigError(f"kl.placement={chosen} is not allowed; allowed: auto, reward, loss or both")
        exact = divergence.input == "logits"
        loss = exact if chosen == "auto" else chosen != "reward"
        if loss and divergence.input == "none":
            raise ConfigError(
                f"kl.placement={chosen} has no penalty to place with divergence={divergence.name}; allowed: auto or "
                "reward, or another divergence"
            )
        if weighted and exact:
            raise ConfigError(
                f"kl.importance_weight=true weights sampled tokens, and divergence={divergence.name} sums over all of "
                "them; allowed: false"
            )
        if weighted and not loss:
            raise ConfigError(
                f"kl.importance_weight=true weights a term of the loss, and kl.placement={chosen} has none here; "
                "allowed: kl.placement=loss or both"
            )
        return cls(reward=chosen != "loss", loss=loss, importance_weight=weighted)

    def sampled_losses(
        self,
        divergence: Divergence,
        logprobs: Float[Tensor, "tokens"],
        old_logprobs: Float[Tensor, "tokens"],
        ref_logprobs: Float[Tensor, "tokens"],
    ) -> Float[Tensor, "tokens"]:
        """An estimator on sampled tokens as a term of the loss, before its coefficient; differentiable in `logprobs`.

        With the importance weight ρ = π/π_old, E_old[∇(ρ d)] is ∇E[d] over the tokens of the *present* policy, whose
        own part d ∇log π comes from ∇ρ. If the penalty is in the reward as well, PPO's surrogate has that part
        already; ρ is then a constant factor, for E_old[ρ ∇d] = E[∇d].
        """
        penalty = divergence(logprobs[None], ref_logprobs[None]).squeeze(0)
        if not self.importance_weight:
            return penalty
        ratio = (logprobs - old_logprobs).exp()
        return penalty * (ratio.detach() if self.reward else ratio)
