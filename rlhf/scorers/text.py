"""Scorers of decoded texts: the data set's own utility, or any Python function."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import hydra
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf.data.special_tokens import unmarked
from rlhf.errors import ConfigError
from rlhf.rollout.sample import Rollouts
from rlhf.scorers import Context, TextScorer, totals
from rlhf.scorers.columns import Columns

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

    It is called with (prompts, responses), two lists of strings, and with the columns of the data set's prompts that
    its further parameters name, each a list (`rlhf.scorers.columns`; `**columns` takes all). It returns for each
    response a number, or a list with the reward of every token (`response.ids`, with EOS if one was sampled).
    """

    def __init__(self, context: Context, function: str):
        self.function: Callable[..., Sequence[Any]] = hydra.utils.get_method(function)
        self.path, self.columns = function, Columns(self.function, context.source)

    def rate(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[Tensor, "batch"]:
        """The score of each response, which is the sum of its rewards if it has one per token.

        Raises:
            ConfigError: the function did not return exactly one score, or one list, per response.
        """
        return totals(self._ask(prompts, responses))

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "batch *response"]:
        """The score of each rollout, or the reward of each of its tokens (0 on padding).

        Raises:
            ConfigError: the function returned another number of scores, or of rewards for a response.
        """
        return self._ask(rollouts.prompts, rollouts.responses).to(rollouts.ended.device)

    def _ask(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[Tensor, "batch *response"]:
        returned = self.function([unmarked(prompt) for prompt in prompts], responses, **self.columns(prompts))
        name = f"scorer.function={self.path} returned"
        try:
            rows = [torch.as_tensor(row, dtype=torch.float32) for row in returned]
        except (TypeError, ValueError, RuntimeError):  # None, or words among the numbers
            rows = []
        shapes = {row.ndim for row in rows}
        if len(rows) != len(responses) or shapes not in ({0}, {1}):
            raise ConfigError(
                f"{name} {_shortened(returned)} for {len(responses)} responses; allowed: a list of as many numbers, or "
                "of as many lists with a reward per token"
            )
        if shapes == {0}:
            return torch.stack(rows)
        for row, response in zip(rows, responses, strict=True):
            tokens = getattr(response, "ids", ())
            if tokens and len(row) != len(tokens):
                raise ConfigError(
                    f"{name} {len(row)} rewards for a response of {len(tokens)} tokens; allowed: one per token, as "
                    "many as response.ids has"
                )
        return pad_sequence(rows, batch_first=True)


def _shortened(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"
