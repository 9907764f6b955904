"""Several reward models of different seeds as one scorer (Coste et al. 2023, arXiv 2310.02743)."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.errors import ConfigError
from rlhf.models.sequences import Sequences
from rlhf.rollout.sample import Rollouts
from rlhf.scorers import Context
from rlhf.scorers.reward_model import scores_of

Scores = Float[Tensor, "members batch"]
LARGEST = 32  # members


def mean(scores: Scores, coef: float) -> Float[Tensor, "batch"]:
    """The mean of the members; `coef` is not used."""
    return scores.mean(0)


def worst_case(scores: Scores, coef: float) -> Float[Tensor, "batch"]:
    """The lowest of the members (worst-case optimisation, WCO); `coef` is not used."""
    return scores.min(0).values


def uncertainty_weighted(scores: Scores, coef: float) -> Float[Tensor, "batch"]:
    """The mean less `coef` times the variance among the members, divided by their number (UWO)."""
    return scores.mean(0) - coef * scores.var(0, correction=0)


COMBINE: dict[str, Callable[[Scores, float], Tensor]] = {
    "mean": mean,
    "worst_case": worst_case,
    "uncertainty_weighted": uncertainty_weighted,
}


class Ensemble:
    """The scores of `members` reward models, combined into one score per rollout.

    The reward models differ in their seed alone, and with it in their head, their adapter and the order of the
    comparisons. They are adapters on the one base: each scores the sampled ids in a pass of its own. Each one's mean
    score of demonstrations is subtracted first, because a reward model's scores are defined only up to a constant. The
    first member is the role `reward`, from which the value function starts; the others are `Context.members`.

    Attributes:
        spread: standard deviation among the members for each rollout of the last call, [batch].
    """

    needs_reward_model: ClassVar[bool] = True
    needs_members: ClassVar[bool] = True

    def __init__(self, context: Context, members: int, combine: str = "mean", uncertainty_coef: float = 0.5):
        self.context, self.coef, self.combine = context, uncertainty_coef, COMBINE[combine]
        self.roles = [("reward", context.reward_baseline), *context.members][:members]
        self.spread: Tensor | None = None

    @classmethod
    def check(cls, chosen: Mapping[str, Any]) -> None:
        """Check the keys of the YAML file.

        Raises:
            ConfigError: a value is not allowed.
        """
        members, combine, coef = chosen["members"], chosen.get("combine", "mean"), chosen.get("uncertainty_coef", 0.5)
        if not 2 <= members <= LARGEST:
            raise ConfigError(f"scorer.members={members} is not allowed; allowed: a whole number from 2 to {LARGEST}")
        if combine not in COMBINE:
            raise ConfigError(f"scorer.combine={combine} is not allowed; allowed: {', '.join(COMBINE)}")
        if not 0 <= coef < float("inf"):
            raise ConfigError(f"scorer.uncertainty_coef={coef} is not allowed; allowed: a number of 0 or above")

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "batch"]:
        """The combined score of each rollout."""
        scores = self.score(rollouts.sequences)
        self.spread = scores.std(0, correction=0)
        return self.combine(scores, self.coef)

    def score(self, batch: Sequences) -> Float[Tensor, "members batch"]:
        """The score of each sequence by each member, less its mean score of demonstrations."""
        return torch.stack([scores_of(self.context, role, batch) - baseline for role, baseline in self.roles])
