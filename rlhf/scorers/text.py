"""Scorers of decoded texts: the data set's own utility, or any Python function."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import hydra
import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.data.special_tokens import unmarked
from rlhf.scorers import Context, TextScorer


class GoldScorer(TextScorer):
    """The data set's `utility(prompt, response)`: PPO optimises the true objective, without a reward model."""

    needs_utility: ClassVar[bool] = True

    def __init__(self, context: Context):
        self.utility: Callable[[str, str], float] = context.source.utility  # type: ignore[attr-defined]

    def rate(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[Tensor, "batch"]:
        """The utility of each response."""
        return torch.tensor([self.utility(*pair) for pair in zip(prompts, responses, strict=True)])


class FunctionScorer(TextScorer):
    """A function named by its path: `scorer=function scorer.function=my.module.score`.

    It is called with (prompts, responses), two lists of strings, and returns a number for each pair.
    """

    def __init__(self, context: Context, function: str):
        self.function: Callable[[Sequence[str], Sequence[str]], Sequence[float]] = hydra.utils.get_method(function)

    def rate(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[Tensor, "batch"]:
        """The score of each response.

        Raises:
            ValueError: the function did not return exactly one score per response.
        """
        scores = torch.as_tensor(
            self.function([unmarked(prompt) for prompt in prompts], responses), dtype=torch.float32
        )
        if scores.shape != (len(responses),):
            raise ValueError(f"scorer.function returned shape {tuple(scores.shape)} for {len(responses)} responses")
        return scores
