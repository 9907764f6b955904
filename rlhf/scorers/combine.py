"""Scorers made of scorers: a weighted sum, and a price on length to put into one."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from hydra.utils import instantiate
from jaxtyping import Float
from torch import Tensor

from rlhf.errors import ConfigError
from rlhf.rollout.sample import Rollouts
from rlhf.scorers import Context, Scorer


class WeightedSum:
    """Σ weight · score over `terms`, each `{weight: number, scorer: {_target_: …}}`.

    A term needs what its scorer needs: a reward model is trained if one of them reads it.

    Raises:
        ConfigError: no terms, or a term without weight or scorer.
    """

    needs_reward_model: ClassVar[bool] = False

    def __init__(self, context: Context, terms: Mapping[str, Any] | Sequence[Any]):
        self.terms: list[tuple[float, Scorer]] = []
        for term in terms.values() if isinstance(terms, Mapping) else terms:
            if set(term) != {"weight", "scorer"} or "_target_" not in term["scorer"]:
                raise ConfigError(f"scorer.terms: {dict(term)} is no term; allowed: weight and scorer._target_")
            self.terms.append((float(term["weight"]), instantiate(term["scorer"], context, _convert_="all")))
        if not self.terms:
            raise ConfigError("scorer.terms is empty; allowed: terms with a weight and a scorer each")

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "batch"]:
        """The sum for each rollout."""
        return torch.stack([weight * scorer(rollouts) for weight, scorer in self.terms]).sum(0)


class LengthPenalty:
    """−(response tokens beyond `free`): what a token costs is the weight it is given in a sum."""

    needs_reward_model: ClassVar[bool] = False

    def __init__(self, context: Context, free: int = 0):
        self.free = free

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "batch"]:
        """Minus the tokens that are counted."""
        return -(rollouts.mask.sum(1) - self.free).clamp(min=0).float()
