"""What an architecture supports, read off a model without weights before anything is loaded or trained."""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from rlhf.errors import ConfigError, ModelError
from rlhf.settings import ModelSettings

# Names of modules and buffers with a row per position: GPT-2's wpe, OPT's embed_positions, BERT's position_embeddings.
POSITIONS = re.compile(r"wpe|position_embeddings|embed_positions|positions_embed|pos_emb")


def check_decoder(config: PreTrainedConfig, where: str) -> None:
    """Check that a configuration is that of a decoder. transformers makes a causal language model of others, too.

    `where` is the key that names the model, and its value.

    Raises:
        ModelError: it is an encoder, which reads texts in both directions, or has one.
    """
    parts = "an encoder beside its decoder" if config.is_encoder_decoder else None
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        parts = parts or "an encoder, which reads texts in both directions"
    if parts:
        raise ModelError(
            f"{where}: the model type {config.model_type} has {parts}; allowed: a decoder-only language model, such as "
            "those in conf/model"
        )


def check_architecture(lm: PreTrainedModel, model: ModelSettings, lengths: Mapping[str, int]) -> None:
    """Check that a model can be trained here, from its skeleton `lm` (see `rlhf.models.loading.skeleton`).

    `lengths` maps configuration keys to the longest sequence, in tokens, that results from them.

    Raises:
        ConfigError: the checkpoint is quantised, the model is recurrent, or it has too few positions.
    """
    where = "model.config" if model.name_or_path is None else f"model.name_or_path={model.name_or_path}"
    name = type(lm).__name__
    stored: Any = getattr(lm.config, "quantization_config", None)
    if stored and model.gguf_file is None:
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        raise ConfigError(
            f"{where}: the checkpoint is already quantized ({stored.get('quant_method')}), and trained weights "
            "cannot be merged into rounded ones; allowed: the same model in 16 or 32 bits, with quantization=int8 or "
            "nf4 to store it in fewer"
        )
    if not getattr(lm.config.get_text_config(), "num_attention_heads", None):
        raise ConfigError(
            f"{where}: {name} has no attention heads but a recurrent state, which sampling and scoring do not "
            "support; allowed: a model with attention"
        )
    limit = max_positions(lm)
    for key, length in lengths.items():
        if limit is not None and length > limit:
            raise ConfigError(f"{key}: {where} ({name}) has {limit} positions; allowed: up to {limit}")


def is_recurrent(lm: PreTrainedModel) -> bool:
    """Whether some layers keep a state that changes with every token, instead of keys and values of each."""
    kinds = getattr(lm.config.get_text_config(), "layer_types", None) or []
    return lm._is_stateful or any("attention" not in kind or "linear" in kind for kind in kinds)


def has_classifier(lm: PreTrainedModel) -> bool:
    """Whether transformers, or the model's own code, has a sequence classifier of this architecture.

    A whole reward model is saved as one. Granite and Cohere have none.
    """
    own = getattr(lm.config, "auto_map", None) or {}
    return type(lm.config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or "AutoModelForSequenceClassification" in own


def hidden_size_of(model: PreTrainedModel) -> int:
    """Size of the last hidden states.

    It can differ from the size inside the blocks: OPT-350M projects its states down before the language-model head.
    """
    head = model.get_output_embeddings() or getattr(model, "score", None)
    return int(getattr(head, "in_features", None) or model.config.get_text_config().hidden_size)


def max_positions(model: nn.Module) -> int | None:
    """The longest sequence a model has positions for; None without a limit (rotary positions, most uses of ALiBi)."""
    config: Any = model.config
    tables = [m for name, m in model.named_modules() if _is_position_table(name) and isinstance(m, nn.Embedding)]
    limits = [table.num_embeddings - _reserved_rows(table) for table in tables]
    buffers = [buffer for name, buffer in model.named_buffers() if _is_position_table(name)]
    limits += [len(buffer) for buffer in buffers if buffer.dim() == 2]
    if config.model_type == "mpt":  # precomputes ALiBi biases for this many positions
        limits.append(config.max_seq_len)
    return min(limits, default=None)


def _is_position_table(name: str) -> bool:
    """Whether a module or buffer of this name holds text positions, not those of an image or sound encoder."""
    path, _, last = name.rpartition(".")
    return POSITIONS.search(last) is not None and not re.search("vision|audio", path)


def _reserved_rows(table: nn.Embedding) -> int:
    """Rows before that of position 0: OPT stores the number as `offset`; RoBERTa starts behind its padding row."""
    padding = table.padding_idx
    return getattr(table, "offset", 0 if padding is None else padding + 1)
