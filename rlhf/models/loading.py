"""Load tokenizers and causal language models from the Hub, a folder or a GGUF file, or create them from a config."""

import logging
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
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

from rlhf.data.records import DataSource
from rlhf.errors import ModelError, explained
from rlhf.models.architecture import check_decoder
from rlhf.models.language_part import RENAMED, language_part
from rlhf.models.logits import head_of
from rlhf.models.tokenizing import keep_template
from rlhf.models.tokens import give_pad, stops_of
from rlhf.settings import ModelSettings

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BPE_VOCABULARY = 4096  # entries of a tokenizer that is trained here


def load_tokenizer(model: ModelSettings, source: DataSource | None = None) -> PreTrainedTokenizerBase:
    """The model's own tokenizer. For a model created from a config: that of the data set, or a BPE trained on it.

    The tokenizer always has a pad token (`give_pad`). Batches here do not use it, but exported models and other
    programs do. It pads on the left. If `source` has a prompt template, special tokens in it are encoded as special
    tokens (`keep_template`).

    Raises:
        ModelError: no tokenizer can be loaded, or it has no EOS token.
        DataError: it lacks a token of the prompt template.
    """
    if model.name_or_path is not None:
        name = model.tokenizer or model.name_or_path
        gguf = {} if model.tokenizer or model.gguf_file is None else {"gguf_file": model.gguf_file}
        key = "tokenizer" if model.tokenizer else "name_or_path"
        with explained(f"model.{key}={name}: no tokenizer could be loaded"):
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=model.trust_remote_code, **gguf)
    elif source is None:
        raise ModelError("model.name_or_path is null, and there is no data set to provide a tokenizer")
    elif hasattr(source, "tokenizer"):
        tokenizer = source.tokenizer()
    else:
        tokenizer = train_tokenizer(text for row in source.load("sft") for text in row.values())
    keep_template(tokenizer, source)  # whose end of turn becomes EOS
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {model.name_or_path} has no EOS token, without which no response ends")
    give_pad(tokenizer, stops_of(tokenizer, *_declared(model)))
    tokenizer.padding_side = "left"
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocabulary: int = BPE_VOCABULARY) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `texts`, for small new models on data sets without a tokenizer of their own."""
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
    """Load a causal language model, in eval mode and without dropout: rollouts and updates must see the same policy.

    `path` is the folder of a model saved here; by default the configured model is loaded, or created if
    `model.name_or_path` is null. `dtype` defaults to `model.dtype`. `quantization` are the keyword arguments of
    `BitsAndBytesConfig`.

    Raises:
        ModelError: no model can be loaded, its vocabulary is smaller than the tokenizer's, or it makes its logits in a
            way that cannot be used here (`head_of`).
    """
    # 1. Load or create.
    where, dtype = path or model.name_or_path, dtype or DTYPES[model.dtype]
    if where is None:
        lm = _new_model(model, tokenizer, dtype)
    else:
        options = _loading_options(model, path, quantization, dtype)
        with explained(f"{where}: no causal language model could be loaded"):
            renaming = _language_part_options(model, where)
        lm = load_whole(AutoModelForCausalLM, where, "causal language model", **options, **renaming)
        if renaming:
            lm._weight_conversions = None  # or `save_pretrained` would rename the weights back

    # 2. Check that every token has an embedding.
    rows = lm.get_input_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        raise ModelError(
            f"{where}: the model has {rows} embeddings, fewer than the tokenizer's {len(tokenizer)} tokens"
        )

    # 3. Prepare for training.
    if model.gguf_file is not None:
        _forget_gguf(lm)
    if quantization:
        _keep_nf4_differentiable(lm)
    switch_off_dropout(lm)
    lm.config.use_cache = True
    lm.eval()
    head_of(lm)  # raises now, not in the middle of a run
    return lm


def _new_model(model: ModelSettings, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> PreTrainedModel:
    """A model with random weights from `model.config`, with the tokenizer's vocabulary and special tokens."""
    config = AutoConfig.for_model(
        **(model.config or {}),
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=model.attn_implementation)


def _loading_options(
    model: ModelSettings, path: str | Path | None, quantization: dict[str, Any] | None, dtype: torch.dtype
) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained`."""
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": model.trust_remote_code}
    if model.gguf_file is not None and path is None:
        options["gguf_file"] = model.gguf_file
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    if quantization:
        options["quantization_config"] = BitsAndBytesConfig(**quantization)
        options["device_map"] = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
    if path is not None:
        # Models saved here are in safetensors. A pickle in a shared cache could run the code of whoever put it there.
        options["use_safetensors"] = True
    return options


def _language_part_options(model: ModelSettings, where: str | Path) -> dict[str, Any]:
    """What loads the language model alone of a checkpoint that reads more than text (`language_part`)."""
    if model.gguf_file is not None:
        return {}
    config = AutoConfig.from_pretrained(where, trust_remote_code=model.trust_remote_code)
    text = language_part(config)
    if text is config:
        return {}
    log.info("%s reads more than text (%s); its language model is loaded alone", where, config.model_type)
    return {"config": text, "key_mapping": RENAMED}


def load_whole(kind: Any, where: str | Path, what: str, **options: Any) -> PreTrainedModel:
    """`kind.from_pretrained(where)`, which must find every weight: none may be left at random values.

    `what` names the kind of model in error messages.

    Raises:
        ModelError: no model can be loaded, or weights are missing or have other shapes.
    """
    with explained(f"{where}: no {what} could be loaded"):
        model, found = kind.from_pretrained(where, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    absent = sorted(found["missing_keys"]) or sorted(key[0] for key in found["mismatched_keys"])
    if absent:
        raise ModelError(
            f"{where}: the weights do not fit this {what}: {len(absent)} are missing or of another shape, "
            f"such as {absent[0]}"
        )
    return model


def skeleton(model: ModelSettings, vocabulary: int | None = None) -> PreTrainedModel | None:
    """The model on the meta device, without weights; None if its configuration cannot be downloaded now.

    `vocabulary` is the number of tokens of a model that is created from a config.

    Raises:
        ModelError: the configuration is not that of a causal language model.
    """
    name = "model.config" if model.name_or_path is None else f"model.name_or_path={model.name_or_path}"
    with explained(f"{name}: no causal language model can be made from this configuration"):
        try:
            config = config_of(model)
        except OSError:  # the Hub cannot be reached, but may be when training starts
            return None
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise ModelError(
                f"{name}: the model comes with code of its own, which would run here; allowed: a model that is part "
                "of transformers, or, for code that you trust, model.trust_remote_code=true"
            ) from error
        check_decoder(config, name)
        if model.name_or_path is None and vocabulary is not None:
            config.vocab_size = vocabulary
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)


def config_of(model: ModelSettings) -> PreTrainedConfig:
    """The configuration of a model that is loaded or made: of its language model, if it reads more than text.

    Raises:
        OSError: it cannot be downloaded now.
    """
    if model.name_or_path is None:
        return AutoConfig.for_model(**(model.config or {}))
    gguf = {} if model.gguf_file is None else {"gguf_file": model.gguf_file}
    return language_part(
        AutoConfig.from_pretrained(model.name_or_path, trust_remote_code=model.trust_remote_code, **gguf)
    )


def _declared(model: ModelSettings) -> tuple[PreTrainedConfig | None, GenerationConfig | None]:
    """The model's config and generation_config, None where unreadable; errors are raised when the model is loaded."""
    config, generation = None, None
    if model.name_or_path is not None:
        with suppress(Exception):
            config = config_of(model)
        with suppress(Exception):
            generation = GenerationConfig.from_pretrained(model.name_or_path)
    return config, generation


def switch_off_dropout(model: PreTrainedModel) -> None:
    """Make the model the same function in training mode as in eval mode: no dropout, no noise in a router's input.

    Architectures store the rates in `nn.Dropout`, in attributes that they pass to `F.dropout`, and in the
    configuration, which some read again in every forward pass. All of them are set to 0.
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
    """Keep bitsandbytes from repacking 4-bit weights in the first forward pass in eval mode on a CPU.

    The kernel for repacked weights does not support autograd: gradients after a rollout would silently be wrong.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # int8 on a CPU logs a line for every call
    for module in lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _forget_gguf(lm: PreTrainedModel) -> None:
    """Remove the marks of quantisation from a model loaded from GGUF.

    Its weights were dequantised on loading, but transformers would refuse `save_pretrained` because of the marks.
    """
    lm.hf_quantizer = None
    for mark in ("is_quantized", "quantization_method"):
        lm.__dict__.pop(mark, None)
    if hasattr(lm.config, "quantization_config"):
        del lm.config.quantization_config
