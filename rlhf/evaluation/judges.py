"""Judges that compare a response with the reference output: 1 for a win, ½ for a draw, 0 for a loss.

A judge is constructed with a `Context` and the keys of its YAML file, and called with prompts and responses.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch

from rlhf.data.records import Prompt
from rlhf.models.sequences import Sequences
from rlhf.models.tokenizing import Response, encode, encode_answers
from rlhf.scorers import Context
from rlhf.scorers.reward_model import RewardModelScorer


def outcome(ours: float, theirs: float, tie: float) -> float:
    """Return 1 if `ours` is higher, 0 if `theirs` is, and ½ if they differ by at most `tie`."""
    return 0.5 if abs(ours - theirs) <= tie else float(ours > theirs)


class GoldJudge:
    """Compares by the data set's own utility (`data=farm`): exact, free, and the same in every run."""

    needs_utility: ClassVar[bool] = True
    needs_reward_model: ClassVar[bool] = False

    def __init__(self, context: Context, tie: float = 0.0):
        self.source, self.tie = context.source, tie

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return the outcome of each comparison."""
        utility = self.source.utility  # type: ignore[attr-defined]
        return [
            outcome(utility(row.prompt, response), utility(row.prompt, row.reference_output), self.tie)
            for row, response in zip(prompts, responses, strict=True)
        ]


class RewardModelJudge:
    """Compares by the learned reward, for data without a better judge: it is biased towards policies trained on it.

    A sampled response is scored by the ids that were sampled, so a truncated one has no EOS. A text from elsewhere,
    such as a reference output from a file, is taken to be complete and gets an EOS, as demonstrations do.

    Args:
        context: The tokenizer and the models, among them the reward model.
        tie: The largest difference in reward that counts as a draw.
        max_tokens: Tokens of a response that are scored. Longer ones are truncated.
    """

    needs_reward_model: ClassVar[bool] = True
    same_tokenizer: ClassVar[bool] = True  # whether sampled ids can be scored as they are

    def __init__(self, context: Context, tie: float = 0.0, max_tokens: int = 512):
        self.context, self.tie, self.max_tokens = context, tie, max_tokens
        self.scorer = RewardModelScorer(context)

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return the outcome of each comparison."""
        ours = self._scores(prompts, responses)
        theirs = self._scores(prompts, [row.reference_output for row in prompts])
        return [outcome(a, b, self.tie) for a, b in zip(ours, theirs, strict=True)]

    def _scores(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        if self.context.reward:
            return self.context.reward.rate([row.prompt for row in prompts], responses).tolist()
        answers = [ids[: self.max_tokens] for ids in self._ids(responses)]
        batch = Sequences.from_lists(encode(self.context.tokenizer, self._prompts(prompts)), answers)
        with torch.no_grad():
            return self.scorer.score(batch).tolist()

    def _prompts(self, rows: Sequence[Prompt]) -> list[str]:
        """Return the prompts as the reward model reads them."""
        return [row.prompt for row in rows]

    def _ids(self, responses: Sequence[str]) -> list[list[int]]:
        """Return the sampled ids of each response, or else the ids of its text, with an EOS if the text is complete."""
        ended = [getattr(text, "ended", True) for text in responses]
        return [
            list(text.ids) if isinstance(text, Response) and text.ids and self.same_tokenizer else ids
            for text, ids in zip(responses, encode_answers(self.context.tokenizer, responses, ended), strict=True)
        ]


class NoJudge:
    """Compares nothing, so that no win rate is reported. For data on which comparisons mean nothing (movie reviews)."""

    needs_reward_model: ClassVar[bool] = False
    compares: ClassVar[bool] = False

    def __init__(self, context: Context):
        pass

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return no outcomes."""
        return []
