"""Judges compare a response with the reference output: 1 a win, ½ a draw, 0 a loss.

Constructed with a `Context` and the keys of their YAML, called with prompts and responses.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch

from rlhf.data.records import Prompt
from rlhf.models.sequences import Sequences
from rlhf.models.tokenizing import Response, encode, encode_texts
from rlhf.scorers import Context
from rlhf.scorers.reward_model import RewardModelScorer


def outcome(ours: float, theirs: float, tie: float) -> float:
    """1, ½ or 0, a difference of at most `tie` being a draw."""
    return 0.5 if abs(ours - theirs) <= tie else float(ours > theirs)


class GoldJudge:
    """The embedded world's own utility decides: exact, free, the same for every run."""

    needs_utility: ClassVar[bool] = True
    needs_reward_model: ClassVar[bool] = False

    def __init__(self, context: Context, tie: float = 0.0):
        self.source, self.tie = context.source, tie

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """The outcome of each comparison."""
        utility = self.source.utility  # type: ignore[attr-defined]
        return [
            outcome(utility(row.prompt, response), utility(row.prompt, row.reference_output), self.tie)
            for row, response in zip(prompts, responses, strict=True)
        ]


class RewardModelJudge:
    """The learned reward decides. Biased towards policies trained on it: a yardstick for lack of a better one.

    A sampled response is scored by the ids that were sampled, so one that was cut off has no EOS. A written one, such
    as a reference output from a file, is taken to end where its text ends, as demonstrations do.
    """

    needs_reward_model: ClassVar[bool] = True
    same_tokenizer: ClassVar[bool] = True  # whether sampled ids are those of the reward model's tokenizer

    def __init__(self, context: Context, tie: float = 0.0, max_tokens: int = 512):
        self.context, self.tie, self.max_tokens = context, tie, max_tokens
        self.scorer = RewardModelScorer(context)

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """The outcome of each comparison."""
        ours = self._scores(prompts, responses)
        theirs = self._scores(prompts, [row.reference_output for row in prompts])
        return [outcome(a, b, self.tie) for a, b in zip(ours, theirs, strict=True)]

    def _scores(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        answers = [ids[: self.max_tokens] for ids in self._ids(responses)]
        batch = Sequences.from_lists(encode(self.context.tokenizer, [row.prompt for row in prompts]), answers)
        with torch.no_grad():
            return self.scorer.score(batch.to(self.context.roles.device)).tolist()

    def _ids(self, responses: Sequence[str]) -> list[list[int]]:
        """Sampled ids as they are where that is possible; else those of the text, with an EOS if it is whole."""
        tokenizer = self.context.tokenizer
        found = []
        for text, ids in zip(responses, encode_texts(tokenizer, responses), strict=True):
            if isinstance(text, Response) and text.ids and self.same_tokenizer:
                found.append(list(text.ids))
            else:
                found.append([*ids, *[tokenizer.eos_token_id] * getattr(text, "ended", True)])
        return found


class NoJudge:
    """For data on which a comparison means nothing, such as reviews continued at random: no win rate is reported."""

    needs_reward_model: ClassVar[bool] = False
    compares: ClassVar[bool] = False

    def __init__(self, context: Context):
        pass

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """No outcomes."""
        return []
