"""A word-level tokenizer made in memory, with one token per word or punctuation mark."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf.data.farm.world import TOKEN, tokenize

SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is the special tokens and the words of `texts`; decoding inverts encoding.

    White space other than line breaks has no tokens. The decoder puts a space before each word, but none before a
    punctuation mark and none after a line break. So a prompt and its response have the same token ids whether they are
    encoded together or separately.
    """
    words = sorted({token for text in texts for token in tokenize(text)})
    vocabulary = {word: number for number, word in enumerate([*SPECIAL_TOKENS.values(), *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    # `invert` makes the matches of the pattern the tokens, and what lies between them is removed.
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), behavior="removed", invert=True)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex(r"^(?=\w)"), " "),  # applied to each token: a space before a word
            decoders.Fuse(),
            decoders.Replace("\n ", "\n"),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS)
