"""Encode prompts and responses. The name of a special token in the data is encoded as ordinary text.

Special tokens come from two sources only: the tokenizer, which puts some around a text (such as BOS), and the prompt
template of the data set. With a chat template, all of them are the template's, also the one that ends a response.
"""

import logging
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.data.chat_template import ChatTemplate
from rlhf.data.special_tokens import MARK, special_ids, special_names, unmarked
from rlhf.data.templates import Template
from rlhf.errors import DataError

log = logging.getLogger(__name__)


class Response(str):
    """The text of a sampled response, with its token ids and whether it `ended` with an EOS."""

    ids: tuple[int, ...]
    ended: bool

    def __new__(cls, text: str, ids: Sequence[int] = (), ended: bool = True) -> "Response":
        """Without `ids`, the text does not come from sampling."""
        response = super().__new__(cls, text)
        response.ids, response.ended = tuple(ids), ended
        return response


def keep_template(tokenizer: PreTrainedTokenizerBase, source: Any) -> PreTrainedTokenizerBase:
    """Let `encode` recognise the special tokens in the prompt template of the data set `source`, if there is one.

    Of format strings, stores a pattern for each variant of the template on the tokenizer. A chat template is stored
    itself: it replaces the tokenizer's own, and its end of turn is EOS from now on, so that it is learnt, sampled and
    saved with the model. Texts that are inserted into a template are still encoded as ordinary text.

    Returns:
        The tokenizer itself.

    Raises:
        DataError: the tokenizer lacks a special token that the chat template writes, as another model's may.
    """
    template, special = getattr(source, "template", None), special_names(tokenizer)
    fixed = template.fixed_texts if isinstance(template, Template) else ()
    tokenizer.prompt_patterns = [
        re.compile("(.*?)".join(f"({re.escape(part)})" for part in parts), re.DOTALL)
        for parts in fixed
        if any(special.search(part) for part in parts)
    ]
    if isinstance(template, ChatTemplate):
        check_written(tokenizer, template)
        tokenizer.conversation, tokenizer.chat_template = template, template.text
        if template.end != tokenizer.eos_token:
            tokenizer.eos_before = tokenizer.eos_token_id
            tokenizer.eos_token = template.end
    return tokenizer


def check_written(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
    """Check that the tokenizer has the special tokens that a chat template writes.

    Raises:
        DataError: it lacks some.
    """
    written = sorted({template.end, *template.special.findall(template.render("a") + template.answer("b"))})
    ids = tokenizer.convert_tokens_to_ids(written)
    unknown = (None, tokenizer.unk_token_id)
    lacking = [name for name, i in zip(written, ids, strict=True) if i in unknown and name != tokenizer.unk_token]
    if lacking:
        raise DataError(
            f"data/template=chat: the template of {template.tokenizer or template.name_or_path} writes "
            f"{', '.join(lacking)}, which the tokenizer of {tokenizer.name_or_path or 'a model made from scratch'} "
            "lacks; allowed: a model whose tokenizer has them, or a template (data.template.chat_template) without them"
        )


def chat_template_of(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """The chat template that `keep_template` stored; None if prompts are made in another way."""
    return getattr(tokenizer, "conversation", None)


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompts, beginning with what the tokenizer puts in front of a text (BOS), without EOS at the end.

    If the prompt template begins with the same tokens, they are not doubled. A chat template writes all of them itself.
    """
    # Prompts without special tokens are encoded in one call, which is faster.
    special, chat = special_names(tokenizer), chat_template_of(tokenizer)
    front = [] if chat else opening(tokenizer)
    pieces = [chat.special.split(prompt) if chat else _pieces(tokenizer, special, prompt) for prompt in prompts]
    plain = [i for i, row in enumerate(pieces) if len(row) == 1]
    rows = dict(zip(plain, encode_texts(tokenizer, [pieces[i][0] for i in plain]), strict=True))
    for i, row in enumerate(pieces):
        if len(row) > 1:
            rows[i] = _templated(tokenizer, special, prompts[i], row)
    return [rows[i] if front and rows[i][: len(front)] == front else [*front, *rows[i]] for i in range(len(prompts))]


def encode_answers(
    tokenizer: PreTrainedTokenizerBase, responses: Sequence[str], ended: Sequence[bool] | None = None
) -> list[list[int]]:
    """Token ids of responses: with what the chat template writes around an answer, and EOS if they `ended` (or all)."""
    chat = chat_template_of(tokenizer)
    if chat is None:
        rows = [[*ids, tokenizer.eos_token_id] for ids in encode_texts(tokenizer, responses)]
    else:
        rows = encode(tokenizer, [chat.answer(text) for text in responses])
    return rows if ended is None else [row if end else row[:-1] for row, end in zip(rows, ended, strict=True)]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts without any special tokens, not even BOS.

    If a vocabulary can express the name of a special token only by that token, it is replaced by unk, or dropped if
    there is no unk.
    """
    if not texts:
        return []
    # mistral-common tokenizers always split special tokens and do not have this option.
    options = {"split_special_tokens": True} if hasattr(tokenizer, "split_special_tokens") else {}
    rows = tokenizer([unmarked(text) for text in texts], add_special_tokens=False, **options)["input_ids"]
    unk = [] if tokenizer.unk_token_id is None else [tokenizer.unk_token_id]
    special = special_ids(tokenizer).difference(unk)
    return [row if special.isdisjoint(row) else _replaced(row, special, unk) for row in rows]


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts in front of a text, such as BOS; empty if none."""
    whole, text = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    return whole[: next((i for i in range(len(whole)) if whole[i : i + len(text)] == text), 0)]


def last_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], room: int) -> list[int]:
    """A prompt cut to `room` tokens: BOS (or the tokenizer's equivalent), if the prompt has it, and the last tokens."""
    front = opening(tokenizer) or [tokenizer.bos_token_id]
    kept = len(front) if list(prompt[: len(front)]) == front else 0
    cut = max(len(prompt) - room, 0)
    return [*prompt[:kept], *prompt[kept + cut :]][:room]


def _pieces(tokenizer: PreTrainedTokenizerBase, special: re.Pattern[str], prompt: str) -> list[str]:
    """Split a prompt at the special tokens of its template: texts at even indices, names of special tokens at odd."""
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
    """The ids of a prompt with special tokens from its template, which `pieces` are split at."""
    # If no text contains the name of a special token, all of the prompt can be encoded at once.
    named = any(MARK in text or special.search(text) for text in pieces[::2])
    if hasattr(tokenizer, "split_special_tokens") and not named:
        return tokenizer(prompt, add_special_tokens=False)["input_ids"]
    texts = iter(encode_texts(tokenizer, pieces[::2]))
    names = iter(tokenizer.convert_tokens_to_ids(pieces[1::2]))
    return [i for place in range(len(pieces)) for i in ([next(names)] if place % 2 else next(texts))]


def _replaced(row: Sequence[int], special: set[int], unk: list[int]) -> list[int]:
    return [i for token in row for i in (unk if token in special else [token])]


def short_enough(tokenizer: PreTrainedTokenizerBase, prompts: list[str], limit: int) -> list[int]:
    """Indices of the prompts with at most `limit` (`model.max_prompt_tokens`) tokens; logs how many are left out.

    Raises:
        DataError: all prompts are longer.
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
    ended: Sequence[bool | None] | None = None,
) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, response ids) of each row, encoded separately, as in generation; responses end with EOS.

    A response that does not fit into `max_length` tokens is cut and has no EOS. Neither has a sampled response that did
    not end with one: `ended` is True or False for sampled responses, None for others. A prompt that leaves no room is
    cut by `last_tokens`, so that one token of the response fits. Logs how many texts are cut, and how many contain the
    name of a special token.
    """
    rows, cut = [], 0
    answers = encode_answers(tokenizer, responses)
    sampled = [] if ended is None else [i for i, end in enumerate(ended) if end is not None]
    # What was sampled has all that a chat template writes around an answer.
    for i, ids in zip(sampled, encode_texts(tokenizer, [responses[i] for i in sampled]), strict=True):
        answers[i] = [*ids, tokenizer.eos_token_id] if ended and ended[i] else ids
    for prompt, answer in zip(encode(tokenizer, prompts), answers, strict=True):
        if len(prompt) >= max_length:
            prompt = last_tokens(tokenizer, prompt, max_length - 1)
        rows.append((prompt, answer[: max_length - len(prompt)]))
        cut += len(prompt) + len(answer) > max_length
    if cut:
        log.warning("%d of %d texts are longer than max_length=%d tokens and cut", cut, len(rows), max_length)
    found = _count_special_names(tokenizer, prompts, responses)
    if found:
        log.warning("%d of %d prompts and responses contain the name of a special token, which is read as text",
                    found, 2 * len(rows))  # fmt: skip
    return rows


def _count_special_names(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], responses: Sequence[str]) -> int:
    """The number of texts that contain the name of a special token as ordinary text."""
    special = special_names(tokenizer)
    if chat_template_of(tokenizer):
        named = sum(MARK in prompt for prompt in prompts)
    else:
        named = sum(any(map(special.search, _pieces(tokenizer, special, prompt)[::2])) for prompt in prompts)
    return named + sum(special.search(response) is not None for response in responses)
