"""Byte-level tokenizers with the special tokens of well-known models."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

END, NAMES = "<|endoftext|>", ("<unk>", "<s>", "</s>")


def byte_level(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """One token per byte, followed by the special tokens, as in GPT-2, Qwen and Llama 3."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def gpt2() -> PreTrainedTokenizerFast:
    return byte_level(END, bos_token=END, eos_token=END, unk_token=END)


def llama(eos: bool = False) -> PreTrainedTokenizerFast:
    """Bytes and '▁', with BOS first (and EOS last), as in the sentencepiece tokenizers of Llama 2 and Gemma."""
    vocabulary = {name: i for i, name in enumerate([*NAMES, *(f"<0x{i:02X}>" for i in range(256)), "▁"])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    single = "<s> $A </s>" if eos else "<s> $A"
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in NAMES])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
