"""The token ids that end a response and the one that pads, as used here and as written into saved models."""

import re
from collections.abc import Collection, Iterable
from typing import Any

from transformers import AddedToken, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.special_tokens import special_ids

# In the names of special tokens that a model's authors left unused.
_UNUSED = re.compile("reserved|unused|placeholder|dummy|extra", re.IGNORECASE)
# The byte 0xFF in vocabularies of byte-level BPE and of sentencepiece. It never occurs in UTF-8.
_BYTE_FF = ("ÿ", "<0xFF>")


def stop_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> tuple[int, ...]:
    """The ids that end a response, here and in `model.generate`; see `stops_of`."""
    return stops_of(tokenizer, model.config, getattr(model, "generation_config", None))


def stops_of(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig | None, generation: GenerationConfig | None
) -> tuple[int, ...]:
    """The tokenizer's EOS, which ends every demonstration, followed by the other ids the checkpoint stops at.

    With a chat template, EOS is the token that ends a turn (`rlhf.models.tokenizing.keep_template`), and the one that
    the tokenizer had before comes second. The checkpoint's are read from the generation_config, which for a chat model
    also names the end of a turn, or else from the config. A single id that is only in the config may be the default of
    the config's class (2 for Llama), which can be any word of this vocabulary: it counts only if it is a special token.
    """
    declared = _eos_ids(generation)
    if generation is None or (getattr(generation, "_from_model_config", False) and len(declared) < 2):
        declared = _eos_ids(config) or declared
        if len(declared) < 2:
            declared = [token for token in declared if token in special_ids(tokenizer)]
    before = getattr(tokenizer, "eos_before", None)
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *([] if before is None else [before]), *declared]))


def _eos_ids(config: PreTrainedConfig | GenerationConfig | None) -> list[int]:
    eos = getattr(config, "eos_token_id", None)
    return [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos]


def settle_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write EOS and pad token into the model's config and generation_config, where transformers reads them.

    `generate` then stops where the policy stopped in training. Other options in the base's generation_config (top-k,
    temperature, suppressed tokens) are dropped: they were chosen for another model, and would change the trained
    distribution.

    transformers' classifiers compute the score at the last token that is not the config's pad token. If the tokenizer
    pads with EOS (see `give_pad`), the config gets no pad token: single texts are then scored correctly and batches are
    refused, instead of being scored one token too early.
    """
    stops, pad = stop_ids(tokenizer, model), tokenizer.pad_token_id
    for config in (model.config, model.config.get_text_config()):
        config.eos_token_id = stops[0]
        config.pad_token_id = None if pad in stops else pad
    if model.can_generate():
        eos: Any = list(stops) if len(stops) > 1 else stops[0]
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id, eos_token_id=eos, pad_token_id=pad
        )


def give_pad(tokenizer: PreTrainedTokenizerBase, stops: Collection[int]) -> None:
    """Ensure that the tokenizer has a pad token, if possible one that never occurs in a text, nor begins or ends it.

    No token is added: the model would give probability to its untrained embedding. The pad token is the first that
    exists of: the tokenizer's own pad token, unless it is EOS or BOS; a special token with "pad" in its name; unk; a
    special token with a name like "reserved" or "unused"; the byte 0xFF, which no text contains, for tokenizers like
    GPT-2's, whose only special token is EOS; a special token that is not in the chat template; BOS; EOS.
    """
    unfit = {*stops, tokenizer.bos_token_id}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in unfit:
        return
    special = [str(tokenizer.convert_ids_to_tokens(i)) for i in sorted(special_ids(tokenizer) - unfit)]
    unknown = [token for token in special if token == tokenizer.unk_token]
    byte = [] if unknown or _first(special, "pad") else _byte_ff(tokenizer)
    unwritten = [token for token in special if token not in str(tokenizer.chat_template)]
    candidates: list[str | AddedToken | None] = [
        _first(special, "pad"),
        *unknown,
        next(filter(_UNUSED.search, special), None),
        *byte,
        *unwritten,
        tokenizer.bos_token,
        tokenizer.eos_token,
    ]
    chosen = next(token for token in candidates if token is not None)
    if isinstance(chosen, AddedToken):
        tokenizer.add_special_tokens({"pad_token": chosen})
    else:
        tokenizer.pad_token = chosen


def _first(tokens: Iterable[str], word: str) -> str | None:
    return next((token for token in tokens if word in token.lower()), None)


def _byte_ff(tokenizer: PreTrainedTokenizerBase) -> list[AddedToken]:
    """The token of the byte 0xFF, if there is one.

    It only matches as a separate word: in byte-level BPE its name is the letter ÿ, which occurs in texts.
    """
    vocabulary = tokenizer.get_vocab()
    return [
        AddedToken(token, special=True, normalized=False, single_word=True)
        for token in _BYTE_FF
        if token in vocabulary and tokenizer.decode([vocabulary[token]]) == "\ufffd"
    ]
