"""The assistant's earlier turns in the token ids of a prompt, which supervised fine-tuning may learn from as well."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rlhf.errors import ConfigError
from rlhf.models.tokenizing import chat_template_of, encode


class AssistantTurns:
    """Finds the tokens that the assistant wrote in a prompt that is a conversation.

    Special tokens tell where a turn begins and ends. No content can imitate them, because names of special tokens in
    a content are encoded as text.

    Raises:
        ConfigError: the tokenizer has no chat template.
        DataError: the template does not mark turns with special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        chat = chat_template_of(tokenizer)
        if chat is None:
            raise ConfigError(
                "sft.loss_on=assistant needs data/template=chat, which tells turns apart; allowed: response"
            )
        start, end = chat.earlier_turn
        self.start = encode(tokenizer, [start])[0]
        self.end = int(tokenizer.convert_tokens_to_ids(end))
        self.learns_end = self.end == tokenizer.eos_token_id  # not if it only ends turns that are not the last

    def __call__(self, prompt: Sequence[int]) -> list[bool]:
        """For each token whether the assistant wrote it; true for the end of a turn, if it is also that of the last."""
        found, width, place = [False] * len(prompt), len(self.start), 0
        while place < len(prompt):
            if list(prompt[place : place + width]) != self.start:
                place += 1
                continue
            first = place + width
            place = next((i for i in range(first, len(prompt)) if prompt[i] == self.end), len(prompt))
            if place < len(prompt):  # else it is the turn that the response begins
                last = place + self.learns_end
                found[first:last] = [True] * (last - first)
        return found
