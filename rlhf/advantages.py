"""Advantages of sampled tokens, as pure functions: what `conf/advantages` chooses between.

An estimator takes a `RewardedBatch` and returns an advantage per token, [batch, time], 0 off the mask. All but `gae`
need no value function. They see rewards per token: whatever is in the reward (the score on the last token, and a
penalty per token if the divergence acts there) is in the return that they compare.

Each function names its source; docs/advantages.md has the formulas side by side.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf import ppo


@dataclass(frozen=True)
class RewardedBatch:
    """A rollout batch with its rewards.

    `prompts` numbers the prompt of each row: rows of the same number answer the same prompt, and all answers to a
    prompt are here. `values` are those of a value function, `greedy_scores` the score of the greedy answer to each
    row's prompt; None where `advantages.baseline` asks for neither. In each row the mask is true up to some position
    and false after it. `gamma` and `lam` are `ppo.gamma` and `ppo.lam`.
    """

    rewards: Float[Tensor, "batch time"]
    mask: Bool[Tensor, "batch time"]
    prompts: Int[Tensor, "batch"]
    gamma: float = 1.0
    lam: float = 1.0
    values: Float[Tensor, "batch time"] | None = None
    greedy_scores: Float[Tensor, "batch"] | None = None

    def per_token(self, x: Float[Tensor, "batch"]) -> Float[Tensor, "batch time"]:
        """Give each token the number of its row; 0 off the mask."""
        return torch.where(self.mask, x[:, None], 0.0)

    def group_sum(self, x: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
        """For each row the sum of `x` over the answers to its prompt."""
        return torch.where(self.prompts[:, None] == self.prompts, x, 0.0).sum(1)


Estimator = Callable[[RewardedBatch], Float[Tensor, "batch time"]]


def gae(batch: RewardedBatch) -> Float[Tensor, "batch time"]:
    """Generalised advantage estimation (`ppo.gae`)."""
    assert batch.values is not None
    return ppo.gae(batch.rewards, batch.values, batch.mask, batch.gamma, batch.lam)[0]


def reward_to_go(batch: RewardedBatch) -> Float[Tensor, "batch time"]:
    """REINFORCE (Williams 1992): A_t = Σ_{i ≥ t} γ^(i−t) r_i, without a baseline.

    Whitened over the batch (`ppo.whiten_advantages`) it is REINFORCE++ (Hu et al. 2025, arXiv 2501.03262). It is `gae`
    with values of 0 and λ = 1.
    """
    return ppo.gae(batch.rewards, torch.zeros_like(batch.rewards), batch.mask, batch.gamma, 1.0)[0]


def rloo(batch: RewardedBatch) -> Float[Tensor, "batch time"]:
    """REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv 2402.14740): R_i less the mean return of the other answers.

    R_i = Σ_t γ^t r_{i,t} is the return of the whole answer, so that all its tokens have the same advantage.

    Raises:
        ValueError: a prompt has a single answer.
    """
    returns, sizes = _returns(batch), _sizes_of_groups(batch)
    others = (batch.group_sum(returns) - returns) / (sizes - 1)
    return batch.per_token(returns - others)


def grpo(batch: RewardedBatch, divide_by_std: bool = True) -> Float[Tensor, "batch time"]:
    """Group-relative advantages (Shao et al. 2024, arXiv 2402.03300): (R_i − mean of the group) / standard deviation.

    R_i as in `rloo`. The standard deviation is that of the sample (n − 1), plus 1e-4, as TRL has it. Without the
    division (Liu et al. 2025, arXiv 2503.20783, "Dr. GRPO"), questions that are almost always or almost never answered
    right get no extra weight.

    Raises:
        ValueError: a prompt has a single answer.
    """
    returns, sizes = _returns(batch), _sizes_of_groups(batch)
    centred = returns - batch.group_sum(returns) / sizes
    if divide_by_std:
        centred = centred / ((batch.group_sum(centred.square()) / (sizes - 1)).sqrt() + 1e-4)
    return batch.per_token(centred)


def remax(batch: RewardedBatch) -> Float[Tensor, "batch time"]:
    """ReMax (Li et al. 2024, arXiv 2310.10505): the reward-to-go, less the score of the greedy answer to the prompt.

    The baseline is a score alone: it depends on the prompt only, so that it leaves the gradient unbiased whatever else
    is in the rewards.
    """
    assert batch.greedy_scores is not None
    return reward_to_go(batch) - batch.per_token(batch.greedy_scores)


def _returns(batch: RewardedBatch) -> Float[Tensor, "batch"]:
    """The discounted sum of each row's rewards."""
    return reward_to_go(batch)[:, 0]


def _sizes_of_groups(batch: RewardedBatch) -> Float[Tensor, "batch"]:
    """For each row the number of answers to its prompt, as a float; at least 2."""
    sizes = batch.group_sum(torch.ones_like(batch.rewards[:, 0]))
    if bool((sizes < 2).any()):
        raise ValueError("a single answer to a prompt has no others to be compared with")
    return sizes
