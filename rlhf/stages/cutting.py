"""What cutting texts to `max_length` tokens can spoil: pairs that become equal, responses of which little remains.

A prompt as long as the limit leaves one token of its response, and two answers that begin alike become the same text.
Such a pair has the loss log 2 and no gradient, whatever the model; it would only dilute the batches and the accuracy.
"""

import logging
from collections.abc import Sequence
from typing import TypeVar

from rlhf.errors import DataError

log = logging.getLogger(__name__)
Encoded = tuple[list[int], list[int]]  # the ids of prompt and response
Row = TypeVar("Row")
FEW = 4  # a cut response with fewer tokens than this carries next to no information


def distinct(
    rows: Sequence[Row], pairs: Sequence[tuple[Encoded, Encoded]], name: str, limit: str
) -> tuple[list[Row], list[tuple[Encoded, Encoded]], dict[str, int]]:
    """The rows and pairs whose sides still differ in their tokens, and the number of pairs left out, by reason.

    `name` says which rows these are and `limit` which setting cut them, such as "reward.max_length=512".

    Raises:
        DataError: no pair differs.
    """
    kept = [index for index, (chosen, rejected) in enumerate(pairs) if chosen != rejected]
    equal = len(pairs) - len(kept)
    if not equal:
        return list(rows), list(pairs), {}
    if not kept:
        raise DataError(f"{name}: within {limit} tokens, chosen and rejected are equal in all {equal:,} pairs.")
    log.warning("%s: %d of %d pairs are left out: within %s tokens, chosen and rejected are equal",
                name, equal, len(pairs), limit)  # fmt: skip
    counts = {f"chosen and rejected are equal within {limit} tokens": equal}
    return [rows[index] for index in kept], [pairs[index] for index in kept], counts


def count_short(texts: Sequence[Encoded], max_length: int, eos: int | None, name: str, limit: str) -> dict[str, int]:
    """The number of cut responses with fewer than `FEW` tokens, by reason. They are kept, with a warning."""
    short = sum(
        len(response) < FEW and response[-1:] != [eos] and len(prompt) + len(response) >= max_length
        for prompt, response in texts
    )
    if not short:
        return {}
    log.warning("%s: %d of %d responses keep fewer than %d tokens, because their prompts almost fill %s tokens",
                name, short, len(texts), FEW, limit)  # fmt: skip
    return {f"fewer than {FEW} response tokens within {limit} tokens": short}
