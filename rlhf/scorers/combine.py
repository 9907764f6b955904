"""A weighted sum of other scorers, and a length penalty to use as one of its terms."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from hydra.utils import instantiate
from jaxtyping import Float
from torch import Tensor

from rlhf.errors import ConfigError
from rlhf.ppo import shape_rewards
from rlhf.rollout.sample import Rollouts
from rlhf.scorers import Context, Scorer


class WeightedSum:
    """Σ weight · score over `terms`, each of the form `{weight: number, scorer: {_target_: …}}`.

    `terms` is a list, or a mapping from arbitrary names. A reward model is trained if any of the terms needs one.

    Raises:
        ConfigError: there are no terms, or a term does not have exactly the keys `weight` and `scorer`.
    """

    needs_reward_model: ClassVar[bool] = False

    def __init__(self, context: Context, terms: Mapping[str, Any] | Sequence[Any]):
        self.terms: list[tuple[float, Scorer]] = []
        for term in terms.values() if isinstance(terms, Mapping) else terms:
            if set(term) != {"weight", "scorer"} or "_target_" not in term["scorer"]:
                raise ConfigError(f"scorer.terms: {dict(term)} is not a term; allowed: weight and scorer._target_")
            self.terms.append((float(term["weight"]), instantiate(term["scorer"], context, _convert_="all")))
        if not self.terms:
            raise ConfigError("scorer.terms is empty; allowed: terms with a weight and a scorer each")

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "batch *response"]:
        """The weighted sum of each rollout; if a term rewards tokens, the other terms reward the last one."""
        parts = [weight * scorer(rollouts) for weight, scorer in self.terms]
        if any(part.ndim == 2 for part in parts):
            nothing, mask = torch.zeros(rollouts.mask.shape, device=rollouts.mask.device), rollouts.mask
            parts = [part if part.ndim == 2 else shape_rewards(part, nothing, mask, 0.0) for part in parts]
        return torch.stack(parts).sum(0)

    @property
    def spread(self) -> Tensor | None:
        """The spread of the only term that has one, in the units of the sum."""
        terms = [(weight, getattr(scorer, "spread", None)) for weight, scorer in self.terms]
        found = [abs(weight) * spread for weight, spread in terms if spread is not None]
        return found[0] if len(found) == 1 else None


class LengthPenalty:
    """−(number of response tokens beyond `free`). In a `WeightedSum`, the weight is the price of a token."""

    needs_reward_model: ClassVar[bool] = False

    def __init__(self, context: Context, free: int = 0):
        self.free = free

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "batch"]:
        """The negative number of response tokens beyond `free` (0 for shorter responses)."""
        return -(rollouts.mask.sum(1) - self.free).clamp(min=0).float()
