"""What a rollout batch is worth: a score per rollout, and a reward per token where the scorer gives one."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.distributed import collectives
from rlhf.rollout.sample import Rollouts, rollout
from rlhf.scorers import totals
from rlhf.stages.evaluation import PolicyEvaluation
from rlhf.stages.passes import own_stream


def score(stage: PolicyEvaluation, rollouts: Rollouts, step: int) -> Float[Tensor, "batch"]:
    """The score of each rollout; rewards of single tokens are kept in `rollouts.token_rewards`.

    Raises:
        ValueError: the scorer returned something of another shape than scores [batch] or rewards [batch, response].
    """
    if stage.config.ppo.score_transform == "par":
        return beats_reference(stage, rollouts, step)
    given = stage.scorer(rollouts)
    if given.ndim == 2:
        if given.shape != rollouts.mask.shape:
            shape = tuple(rollouts.mask.shape)
            raise ValueError(f"the scorer returned rewards of shape {tuple(given.shape)} for tokens of shape {shape}")
        rollouts.token_rewards = given
    return totals(given)


def beats_reference(stage: PolicyEvaluation, rollouts: Rollouts, step: int) -> Float[Tensor, "batch"]:
    """How probably each answer beats one of the reference's, by the scorer: PAR (Fu et al. 2025, arXiv 2502.18770).

    The mean over `ppo.reference_answers` answers of the reference to the same prompt of σ(score − its score): bounded,
    centred at ½, and steep where the two are near each other. Rewards of single tokens count by their sum.
    """
    number, settings = stage.config.ppo.reference_answers, stage.config.generation
    repeated = [prompt for prompt in rollouts.prompts for _ in range(number)]
    stream = stage.stream(own_stream("reference answers"), step)
    answers = rollout(stage.engine, stage.roles, "reference", stage.tokenizer, repeated, settings, stream)
    theirs = totals(stage.scorer(answers)).view(-1, number)
    ours = totals(stage.scorer(rollouts))  # last: an ensemble remembers its spread
    return (ours[:, None] - theirs).sigmoid().mean(1)


def spread_metrics(scorer: Callable[[Rollouts], Tensor]) -> dict[str, Tensor]:
    """How far an ensemble's members disagree about the last batch: the mean over the rollouts of all processes."""
    spread: Tensor | None = getattr(scorer, "spread", None)
    if spread is None:
        return {}
    summed = collectives.all_reduce_sum(torch.stack([spread.sum(), spread.new_tensor(float(len(spread)))]))
    return {"ppo/reward_spread": summed[0] / summed[1]}
