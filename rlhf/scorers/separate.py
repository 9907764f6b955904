"""A reward model beside the policy's: trained here, but on another model, or with another tokenizer."""

from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences
from rlhf.models.tokenizing import encode_pairs
from rlhf.scorers import Context, TextScorer
from rlhf.scorers.reward_model import RewardModelScorer


class SeparateRewardModel(TextScorer):
    """Scores texts as the reward model was trained on them: its own ids, an EOS at the end of a complete response.

    Args:
        context: of the run whose policy is rewarded.
        roles: a role `reward` with its head, on models of its own.
        tokenizer: its own.
        max_length: tokens of prompt and response; longer texts are cut.
    """

    def __init__(self, context: Context, roles: Roles, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.scorer = RewardModelScorer(replace(context, roles=roles, tokenizer=tokenizer, reward=None), baseline=0.0)

    def rate(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[Tensor, "batch"]:
        """The score of each response, without baseline; a `Response` that did not end gets no EOS."""
        ended = [getattr(text, "ended", True) for text in responses]
        pairs = encode_pairs(self.tokenizer, prompts, responses, self.max_length, ended)
        return self.scorer.score(Sequences.from_lists([prompt for prompt, _ in pairs], [answer for _, answer in pairs]))
