"""A word-level tokenizer made in memory: one token per word or mark, and text that reads well when decoded."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf.data.farm.world import WORD, split

SPECIALS = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is the words of `texts`, such that decoding what was encoded gives the text back.

    Whitespace is not kept: the decoder sets a space before each word, none before a mark or after a line break. So the
    ids of a prompt and of its response are the same whether they are encoded together or apart.
    """
    words = sorted({token for text in texts for token in split(text)})
    vocabulary = {word: number for number, word in enumerate([*SPECIALS.values(), *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIALS["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex(r"^(?=\w)"), " "),
            decoders.Fuse(),
            decoders.Replace("\n ", "\n"),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **SPECIALS)
