"""The learned reward model as scorer. As a role it reads the sampled ids, not re-encoded texts."""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.models.sequences import Sequences, concatenate
from rlhf.rollout.sample import Rollouts
from rlhf.scorers import Context


class RewardModelScorer:
    """The score of the role `reward` at the last sampled token (the EOS if one was sampled), minus `baseline`.

    With `baseline=None`, the mean score of demonstrations is subtracted: a score of 0 is as good as those on average.
    A reward model that is no role (`Context.reward`) reads the texts.
    """

    needs_reward_model: ClassVar[bool] = True

    def __init__(self, context: Context, baseline: float | None = None):
        self.context = context
        self.baseline = context.reward_baseline if baseline is None else baseline

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "batch"]:
        """The score of each rollout."""
        if self.context.reward:
            return self.context.reward(rollouts) - self.baseline
        return self.score(rollouts.sequences)

    def score(self, batch: Sequences) -> Float[Tensor, "batch"]:
        """The score of each sequence, in the order of the rows."""
        return scores_of(self.context, "reward", batch) - self.baseline


@torch.no_grad()
def scores_of(context: Context, role: str, batch: Sequences) -> Float[Tensor, "batch"]:
    """What the head of a role says of each sequence, in the order of the rows, without baseline."""
    roles = context.roles
    groups = roles.groups(batch.lengths.tolist(), context.microbatch_tokens, frozen=True)
    with roles.scoring(role):
        scores = [roles.last_token_scores(role, batch.rows(group)) for group in groups]
    return concatenate(scores, [row for group in groups for row in group])
