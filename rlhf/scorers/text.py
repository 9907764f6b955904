"""Scorers of decoded texts: the data set's own utility, or any Python function."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import hydra
import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.rollout.sample import Rollouts
from rlhf.scorers import Context


class GoldScorer:
    """The data set's `utility(prompt, response)`: PPO optimises the true objective, without a reward model."""

    needs_reward_model: ClassVar[bool] = False
    needs_utility: ClassVar[bool] = True

    def __init__(self, context: Context):
        self.utility: Callable[[str, str], float] = context.source.utility  # type: ignore[attr-defined]

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "batch"]:
        """The utility of each rollout."""
        pairs = zip(rollouts.prompts, rollouts.responses, strict=True)
        return torch.tensor([self.utility(*pair) for pair in pairs], device=rollouts.ended.device)


class FunctionScorer:
    """A function named by its path: `scorer=function scorer.function=my.module.score`.

    It is called with (prompts, responses), two lists of strings, and returns a number for each pair.
    """

    needs_reward_model: ClassVar[bool] = False

    def __init__(self, context: Context, function: str):
        self.function: Callable[[Sequence[str], Sequence[str]], Sequence[float]] = hydra.utils.get_method(function)

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "batch"]:
        """The score of each rollout.

        Raises:
            ValueError: the function did not return exactly one score per response.
        """
        scores = torch.as_tensor(self.function(rollouts.prompts, rollouts.responses), dtype=torch.float32)
        if scores.shape != (len(rollouts.responses),):
            raise ValueError(
                f"scorer.function returned shape {tuple(scores.shape)} for {len(rollouts.responses)} responses"
            )
        return scores.to(rollouts.ended.device)
