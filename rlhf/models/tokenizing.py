"""From texts to ids. Text is text: what is spelt like a special token in the data stands for its letters.

Special are the tokens that the tokenizer puts around a text and those that the prompt template of the data set writes.
"""

import logging
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.data.templates import Template
from rlhf.errors import DataError
from rlhf.models.tokens import special_ids

log = logging.getLogger(__name__)


class Response(str):
    """The text of a sampled response, with its ids and whether it `ended` by itself, which no text tells."""

    ids: tuple[int, ...]
    ended: bool

    def __new__(cls, text: str, ids: Sequence[int] = (), ended: bool = True) -> "Response":
        """A text that knows where it comes from."""
        response = super().__new__(cls, text)
        response.ids, response.ended = tuple(ids), ended
        return response


def keep_template(tokenizer: PreTrainedTokenizerBase, source: Any) -> PreTrainedTokenizerBase:
    """Let `encode` take the special tokens for such that the template of the data set `source`, if it has one, writes.

    The texts that are put into the template stay text.
    """
    template, special = getattr(source, "template", None), _spelling(tokenizer)
    fixed = template.fixed_texts if isinstance(template, Template) else ()
    tokenizer.prompt_patterns = [
        re.compile("(.*?)".join(f"({re.escape(part)})" for part in parts), re.DOTALL)
        for parts in fixed
        if any(special.search(part) for part in parts)
    ]
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Prompt ids, with the tokenizer's own special tokens in front and no EOS behind.

    Where the template writes what the tokenizer would put in front, it is there once.
    """
    front, special = opening(tokenizer), _spelling(tokenizer)
    pieces = [_pieces(tokenizer, special, prompt) for prompt in prompts]
    plain = [i for i, row in enumerate(pieces) if len(row) == 1]
    rows = dict(zip(plain, encode_texts(tokenizer, [prompts[i] for i in plain]), strict=True))
    for i, row in enumerate(pieces):
        if len(row) > 1:
            rows[i] = _templated(tokenizer, special, prompts[i], row)
    return [rows[i] if front and rows[i][: len(front)] == front else [*front, *rows[i]] for i in range(len(prompts))]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids of texts by themselves: nothing in front, nothing behind, no special token within.

    A vocabulary that can only spell a special token's name by the token itself gives unk for it, or nothing.
    """
    if not texts:
        return []
    # mistral-common knows no other way, and so not this option
    options = {"split_special_tokens": True} if hasattr(tokenizer, "split_special_tokens") else {}
    rows = tokenizer(list(texts), add_special_tokens=False, **options)["input_ids"]
    unk = [] if tokenizer.unk_token_id is None else [tokenizer.unk_token_id]
    special = special_ids(tokenizer).difference(unk)
    return [row if special.isdisjoint(row) else _replaced(row, special, unk) for row in rows]


def spelt(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> int:
    """How many texts contain the name of a special token that stands for its letters."""
    special = _spelling(tokenizer)
    return sum(any(map(special.search, _pieces(tokenizer, special, text)[::2])) for text in texts)


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts in front of a text, such as BOS."""
    whole, text = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    return whole[: next((i for i in range(len(whole)) if whole[i : i + len(text)] == text), 0)]


def last_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], room: int) -> list[int]:
    """A prompt cut to `room` tokens: its last ones, behind the BOS (or what is there in its place) if it has one."""
    front = opening(tokenizer) or [tokenizer.bos_token_id]
    kept = len(front) if list(prompt[: len(front)]) == front else 0
    cut = max(len(prompt) - room, 0)
    return [*prompt[:kept], *prompt[kept + cut :]][:room]


def _pieces(tokenizer: PreTrainedTokenizerBase, special: re.Pattern[str], prompt: str) -> list[str]:
    """Text at the even places, and between them the special tokens that the template writes."""
    patterns = getattr(tokenizer, "prompt_patterns", ())
    found = next(filter(None, (pattern.fullmatch(prompt) for pattern in patterns)), None)
    if found is None:
        return [prompt]
    pieces = [""]
    for i, part in enumerate(found.groups()):
        text, *rest = special.split(part) if i % 2 == 0 else [part]
        pieces[-1] += text
        pieces += rest
    return pieces


def _templated(
    tokenizer: PreTrainedTokenizerBase, special: re.Pattern[str], prompt: str, pieces: list[str]
) -> list[int]:
    """The ids of a prompt with special tokens; piece by piece only where the texts between them spell others."""
    if hasattr(tokenizer, "split_special_tokens") and not any(map(special.search, pieces[::2])):
        return tokenizer(prompt, add_special_tokens=False)["input_ids"]
    texts = iter(encode_texts(tokenizer, pieces[::2]))
    names = iter(tokenizer.convert_tokens_to_ids(pieces[1::2]))
    return [i for place in range(len(pieces)) for i in ([next(names)] if place % 2 else next(texts))]


def _spelling(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    names = {str(tokenizer.convert_ids_to_tokens(i)) for i in special_ids(tokenizer)}
    return re.compile("(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + ")")


def _replaced(row: Sequence[int], special: set[int], unk: list[int]) -> list[int]:
    return [i for token in row for i in (unk if token in special else [token])]


def short_enough(tokenizer: PreTrainedTokenizerBase, prompts: list[str], limit: int) -> list[int]:
    """Which prompts have at most `limit` (`model.max_prompt_tokens`) tokens; how many are left out is logged.

    Raises:
        DataError: not a single one has.
    """
    kept = [i for i, ids in enumerate(encode(tokenizer, prompts)) if len(ids) <= limit]
    if len(kept) < len(prompts):
        log.warning("%d of %d prompts are longer than model.max_prompt_tokens=%d and left out",
                    len(prompts) - len(kept), len(prompts), limit)  # fmt: skip
    if not kept:
        raise DataError(f"no prompt has at most model.max_prompt_tokens={limit} tokens")
    return kept


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    responses: Sequence[str],
    max_length: int,
    ended: Sequence[bool] | None = None,
) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, response ids) a row, encoded apart as at generation, the response ending in EOS.

    A response that does not fit into `max_length` tokens is cut and gets no EOS: its end was not seen. No more has a
    sampled one that has not `ended` by itself. A prompt that leaves no room keeps its BOS, its last tokens and one of
    the response. How many are cut is logged, and how many spell a special token, which is read as text.
    """
    rows, cut = [], 0
    whole = [True] * len(responses) if ended is None else ended
    for prompt, answer, end in zip(encode(tokenizer, prompts), encode_texts(tokenizer, responses), whole, strict=True):
        if len(prompt) >= max_length:
            prompt = last_tokens(tokenizer, prompt, max_length - 1)
        wanted = [*answer, tokenizer.eos_token_id] if end else answer
        rows.append((prompt, wanted[: max_length - len(prompt)]))
        cut += len(prompt) + len(wanted) > max_length
    if cut:
        log.warning("%d of %d texts are longer than max_length=%d tokens and cut", cut, len(rows), max_length)
    found = spelt(tokenizer, prompts) + spelt(tokenizer, responses)
    if found:
        log.warning("%d of %d prompts and responses contain the name of a special token, which is read as text",
                    found, 2 * len(rows))  # fmt: skip
    return rows
