"""Names of special tokens in texts: which a tokenizer has, and how those in the data are kept apart from a template's.

A chat template writes special tokens such as `<|im_end|>` around the contents of messages. The same names inside a
content are ordinary text. In a rendered conversation they are told apart by `MARK`.
"""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A noncharacter of Unicode, which no text may contain: it stands before each character of a special token's name
# that is ordinary text.
MARK = "\ufdd0"


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """The ids of all special tokens, with or without a role such as `eos_token`."""
    try:
        added = tokenizer.added_tokens_decoder
    except NotImplementedError:  # mistral-common tokenizers
        added = {}
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def special_names(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """Matches the unmarked name of any special token; the longest first, since one may begin another."""
    names = {str(tokenizer.convert_ids_to_tokens(i)) for i in special_ids(tokenizer)}
    alternatives = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.compile(f"(?<!{MARK})({alternatives})")


def marked(text: str, special: re.Pattern[str]) -> str:
    """The text with `MARK` before each character of a special token's name."""
    return special.sub(lambda found: "".join(MARK + character for character in found[0]), unmarked(text))


def unmarked(text: str) -> str:
    """The text as people read it."""
    return text.replace(MARK, "")
