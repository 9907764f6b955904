"""Tokenizers and causal language models: from the Hub, a folder, a GGUF file, or fresh from a configuration."""

import logging
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from rlhf.data.records import DataSource
from rlhf.errors import ModelError, explained
from rlhf.models.logits import head_of
from rlhf.models.tokenizing import keep_template
from rlhf.models.tokens import give_pad, stops_of
from rlhf.settings import ModelSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BPE_VOCABULARY = 4096
LINEAR = (nn.Linear, Conv1D)  # GPT-2 has its linear layers transposed


def load_tokenizer(model: ModelSettings, source: DataSource | None = None) -> PreTrainedTokenizerBase:
    """The model's own tokenizer; for a model made from a configuration the data set's, or a BPE trained on it.

    It has a pad token (`give_pad`): our own batches never look at it, but exported models and other programs do. And it
    knows the prompt template of the data set, whose special tokens are such.

    Raises:
        ModelError: none can be loaded, or it has no EOS token, without which no response could end.
    """
    if model.name_or_path is not None:
        name = model.tokenizer or model.name_or_path
        gguf = {} if model.tokenizer or model.gguf_file is None else {"gguf_file": model.gguf_file}
        key = "tokenizer" if model.tokenizer else "name_or_path"
        with explained(f"model.{key}={name}: no tokenizer could be loaded"):
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=model.trust_remote_code, **gguf)
    elif source is None:
        raise ModelError("model.name_or_path is null, and there is no data set to take a tokenizer from")
    elif hasattr(source, "tokenizer"):
        tokenizer = source.tokenizer()
    else:
        tokenizer = train_tokenizer(text for row in source.load("sft") for text in row.values())
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {model.name_or_path} has no EOS token, so that no response could end")
    give_pad(tokenizer, stops_of(tokenizer, *_declared(model)))
    tokenizer.padding_side = "left"
    return keep_template(tokenizer, source)


def train_tokenizer(texts: Iterable[str], vocabulary: int = BPE_VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `texts`, for small models made from scratch on data that brings no tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def load_causal_lm(
    model: ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path | None = None,
    quantization: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """The causal language model at `path` (default: what the configuration names), in the configured dtype.

    `quantization` are the keywords of `BitsAndBytesConfig`. Dropout inside the base is switched off: rollouts and
    updates must see the same policy.

    Raises:
        ModelError: nothing can be loaded there, or its vocabulary is smaller than the tokenizer's.
    """
    dtype = dtype or DTYPES[model.dtype]
    where = path or model.name_or_path
    if where is None:
        config = AutoConfig.for_model(
            **(model.config or {}),
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=model.attn_implementation)
    else:
        options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": model.trust_remote_code}
        if model.gguf_file is not None and path is None:
            options["gguf_file"] = model.gguf_file
        if model.attn_implementation is not None:
            options["attn_implementation"] = model.attn_implementation
        if quantization:
            options["quantization_config"] = BitsAndBytesConfig(**quantization)
            options["device_map"] = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
        if path is not None:  # of our own making: a shared cache is no place for pickles
            options["use_safetensors"] = True
        lm = load_whole(AutoModelForCausalLM, where, "causal language model", **options)
    rows = lm.get_input_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        raise ModelError(
            f"{where}: the model has {rows} embeddings, fewer than the tokenizer's {len(tokenizer)} tokens"
        )
    if model.gguf_file is not None:
        _forget_gguf(lm)
    if quantization:
        _keep_nf4_differentiable(lm)
    switch_off_dropout(lm)
    lm.config.use_cache = True
    lm.eval()
    head_of(lm)  # refused here if it cannot be
    return lm


def load_whole(kind: Any, where: str | Path, what: str, **options: Any) -> PreTrainedModel:
    """`kind.from_pretrained(where)`, of which not a single weight is left at random values.

    Raises:
        ModelError: nothing can be loaded there, or the weights are those of another model.
    """
    with explained(f"{where}: no {what} could be loaded"):
        model, found = kind.from_pretrained(where, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    absent = sorted(found["missing_keys"]) or sorted(key[0] for key in found["mismatched_keys"])
    if absent:
        raise ModelError(
            f"{where}: the weights there are not those of this {what}: {len(absent)} are missing or of another shape, "
            f"such as {absent[0]}"
        )
    return model


def linear_names(lm: PreTrainedModel) -> set[str]:
    """Last names of the linear layers that an adapter can be on.

    Those outside of the layers that make hidden states are left out (the language-model head): an adapter there would
    be no part of what is computed of the states, and with tied embeddings it could not be merged without changing them.
    """
    inside, outside = set[str](), set[str]()
    layers = set(lm.base_model.modules()) - {lm.get_output_embeddings()}
    for name, module in lm.named_modules():
        if isinstance(module, LINEAR):
            (inside if module in layers else outside).add(name.rpartition(".")[2])
    return inside - outside


def skeleton(model: ModelSettings, vocabulary: int | None = None) -> PreTrainedModel | None:
    """The model without weights (on the meta device); None where its configuration cannot be got.

    `vocabulary` is that of the tokenizer, for a model which is made from a configuration.

    Raises:
        ModelError: no causal language model can be made of its configuration.
    """
    name = "model.config" if model.name_or_path is None else f"model.name_or_path={model.name_or_path}"
    with explained(f"{name}: no causal language model can be made of this configuration"):
        try:
            config = _config_of(model)
        except OSError:  # of the Hub, which may be reached later
            return None
        if model.name_or_path is None and vocabulary is not None:
            config.vocab_size = vocabulary
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)


def _config_of(model: ModelSettings) -> PreTrainedConfig:
    if model.name_or_path is None:
        return AutoConfig.for_model(**(model.config or {}))
    gguf = {} if model.gguf_file is None else {"gguf_file": model.gguf_file}
    return AutoConfig.from_pretrained(model.name_or_path, trust_remote_code=model.trust_remote_code, **gguf)


def _declared(model: ModelSettings) -> tuple[PreTrainedConfig | None, GenerationConfig | None]:
    """The model's config and generation_config, as far as they can be read: what is wrong with them is said later."""
    config, generation = None, None
    if model.name_or_path is not None:
        with suppress(Exception):
            config = _config_of(model)
        with suppress(Exception):
            generation = GenerationConfig.from_pretrained(model.name_or_path)
    return config, generation


def switch_off_dropout(model: PreTrainedModel) -> None:
    """Make the model the same function in training as in evaluation: no dropout, no noise in a router's input.

    Architectures keep the rates in `nn.Dropout`, in attributes of their own that they hand to `F.dropout`, and in the
    configuration, which some read again in each forward pass.
    """
    text: Any = model.config.get_text_config()
    for owner in (model.config, text, *model.modules()):
        for key, value in list(vars(owner).items()):
            if isinstance(value, float) and ("drop" in key or "jitter" in key):
                setattr(owner, key, 0.0)
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0


def _keep_nf4_differentiable(lm: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights at the first eval forward on a CPU.

    The repacked weights run a kernel without autograd: training after a rollout would silently have other gradients.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # int8 on a CPU logs a line per call
    for module in lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _forget_gguf(lm: PreTrainedModel) -> None:
    """The weights are dequantised, but transformers goes on marking them and then refuses `save_pretrained`."""
    lm.hf_quantizer = None
    for mark in ("is_quantized", "quantization_method"):
        lm.__dict__.pop(mark, None)
    if hasattr(lm.config, "quantization_config"):
        del lm.config.quantization_config
