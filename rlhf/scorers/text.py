"""Scorers of decoded texts: the data set's own utility, or any Python function."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import hydra
import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.data.special_tokens import unmarked
from rlhf.errors import ConfigError
from rlhf.scorers import Context, TextScorer

MOST_SHOWN = 60  # characters of what a function returned, in a message


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
        self.path = function

    def rate(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[Tensor, "batch"]:
        """The score of each response.

        Raises:
            ConfigError: the function did not return exactly one score per response.
        """
        returned = self.function([unmarked(prompt) for prompt in prompts], responses)
        try:
            scores = torch.as_tensor(returned, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):  # None, words, lists of different lengths
            scores = torch.empty(())
        if scores.shape != (len(responses),):
            raise ConfigError(
                f"scorer.function={self.path} returned {_shortened(returned)} for {len(responses)} responses; allowed: "
                "a list of as many numbers"
            )
        return scores


def _shortened(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"
