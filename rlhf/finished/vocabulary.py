"""Whether a tokenizer knows the words that its model is to read."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_UNKNOWN = 0.5  # of the tokens of a text; names that are not in the vocabulary are far fewer


def check_knows(what: str, tokenizer: "PreTrainedTokenizerBase | None", texts: Sequence[str]) -> None:
    """Check that no more than half of the tokens of texts are unknown, as they are where a model of words reads others.

    Args:
        what: names the model in messages.
        tokenizer: its tokenizer; None if that cannot be read yet, and nothing is checked.
        texts: what it is to read.

    Raises:
        ConfigError: it knows too few of them.
    """
    unknown = tokenizer.unk_token_id if tokenizer is not None else None
    if tokenizer is None or unknown is None or not texts:  # a tokenizer of bytes knows everything
        return
    read = [token for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"] for token in ids]
    share = read.count(unknown) / max(len(read), 1)
    if share > MOST_UNKNOWN:
        raise ConfigError(
            f"{what}: {100 * share:.0f} % of what it would read are no words of its vocabulary, so that it means "
            "nothing; allowed: data of the kind that it was trained on"
        )
