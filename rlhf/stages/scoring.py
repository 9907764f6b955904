"""What a rollout batch is worth: a score per rollout, and a reward per token where the scorer gives one."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.distributed import collectives
from rlhf.rollout.sample import Rollouts
from rlhf.scorers import totals


def score(scorer: Callable[[Rollouts], Tensor], rollouts: Rollouts) -> Float[Tensor, "batch"]:
    """The score of each rollout; rewards of single tokens are kept in `rollouts.token_rewards`.

    Raises:
        ValueError: the scorer returned something of another shape than scores [batch] or rewards [batch, response].
    """
    given = scorer(rollouts)
    if given.ndim == 2:
        if given.shape != rollouts.mask.shape:
            shape = tuple(rollouts.mask.shape)
            raise ValueError(f"the scorer returned rewards of shape {tuple(given.shape)} for tokens of shape {shape}")
        rollouts.token_rewards = given
    return totals(given)


def spread_metrics(scorer: Callable[[Rollouts], Tensor]) -> dict[str, Tensor]:
    """How far an ensemble's members disagree about the last batch: the mean over the rollouts of all processes."""
    spread: Tensor | None = getattr(scorer, "spread", None)
    if spread is None:
        return {}
    summed = collectives.all_reduce_sum(torch.stack([spread.sum(), spread.new_tensor(float(len(spread)))]))
    return {"ppo/reward_spread": summed[0] / summed[1]}
