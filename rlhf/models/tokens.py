"""Which ids end a response and which one pads: decided in one place, written into whatever is saved."""

import re
from collections.abc import Collection, Iterable
from typing import Any

from transformers import AddedToken, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# how special tokens are called that a model's authors left over, for others to use
_LEFT_OVER = re.compile("reserved|unused|placeholder|dummy|extra", re.IGNORECASE)
# the byte 0xFF as byte-level BPE and as sentencepiece spell it: no text in UTF-8 contains it
_NO_TEXT = ("ÿ", "<0xFF>")


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokenizer's special tokens, named (`eos_token`, …) or not."""
    try:
        added = tokenizer.added_tokens_decoder
    except NotImplementedError:  # of mistral-common
        added = {}
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def stop_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> tuple[int, ...]:
    """The ids that end a response, as sampled here and by `model.generate`; see `stops_of`."""
    return stops_of(tokenizer, model.config, getattr(model, "generation_config", None))


def stops_of(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig | None, generation: GenerationConfig | None
) -> tuple[int, ...]:
    """The tokenizer's EOS first, which ends every demonstration; then those that the checkpoint stops at.

    A checkpoint says so in its generation_config, which for a chat model names the template's end of turn as well, or
    else in its config. A single id found in the latter alone may be the default of its class (Llama's is 2), which in
    this vocabulary can be any word: it counts if it is a special token.
    """
    declared = _listed(generation)
    if generation is None or (getattr(generation, "_from_model_config", False) and len(declared) < 2):
        declared = _listed(config) or declared
        if len(declared) < 2:
            declared = [token for token in declared if token in special_ids(tokenizer)]
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *declared]))


def _listed(config: PreTrainedConfig | GenerationConfig | None) -> list[int]:
    eos = getattr(config, "eos_token_id", None)
    return [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos]


def settle_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write EOS and pad token into the model's config and generation_config, for plain transformers to read.

    `generate` then stops where the policy stopped. What else the base's generation_config said (top-k, a temperature,
    tokens to suppress) is left out: it was chosen for another model, and is not the distribution that was trained.

    A classifier reads its score at the last token that is not the pad token of its config. Where only an EOS is there
    to pad with (see `give_pad`), the config names none: single texts are scored rightly, and transformers refuses
    batches, instead of reading each of them one token too early.
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
    """See that there is a pad token, one that neither ends nor begins a text nor is a piece of one.

    Nothing is added to the embedding, as a new row would be given probability without having been trained. Taken is
    the first of: the tokenizer's own pad token; a special token with "pad" in its name; unk; a special token that was
    left over; the byte 0xFF, which GPT-2's relatives, whose only special token is EOS, have a token for and no text
    contains; any special token that the chat template does not write; BOS; and EOS, if there is nothing else.
    """
    unfit = {*stops, tokenizer.bos_token_id}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in unfit:
        return
    special = [str(tokenizer.convert_ids_to_tokens(i)) for i in sorted(special_ids(tokenizer) - unfit)]
    unknown = [token for token in special if token == tokenizer.unk_token]
    byte = [] if unknown or _first(special, "pad") else _byte(tokenizer)
    unwritten = [token for token in special if token not in str(tokenizer.chat_template)]
    candidates: list[str | AddedToken | None] = [
        _first(special, "pad"),
        *unknown,
        next(filter(_LEFT_OVER.search, special), None),
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


def _byte(tokenizer: PreTrainedTokenizerBase) -> list[AddedToken]:
    """The token of the byte 0xFF. As a word by itself only: its spelling in byte-level BPE is that of the letter ÿ."""
    vocabulary = tokenizer.get_vocab()
    return [
        AddedToken(token, special=True, normalized=False, single_word=True)
        for token in _NO_TEXT
        if token in vocabulary and tokenizer.decode([vocabulary[token]]) == "\ufffd"
    ]
