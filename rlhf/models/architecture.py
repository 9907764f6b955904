"""What an architecture can do, read off the model without weights, before anything is loaded or trained."""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from rlhf.errors import ConfigError
from rlhf.settings import ModelSettings

# the modules and buffers that hold a row for each position: GPT-2's wpe, OPT's embed_positions, BERT's …
POSITIONS = re.compile(r"wpe|position_embeddings|embed_positions|positions_embed|pos_emb")


def check_architecture(lm: PreTrainedModel, model: ModelSettings, lengths: Mapping[str, int]) -> None:
    """See that the stages can work with this model, whose longest sequences `lengths` has by the keys that set them.

    Raises:
        ConfigError: one sentence.
    """
    where = "model.config" if model.name_or_path is None else f"model.name_or_path={model.name_or_path}"
    name = type(lm).__name__
    stored: Any = getattr(lm.config, "quantization_config", None)
    if stored and model.gguf_file is None:
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        raise ConfigError(
            f"{where}: the checkpoint is quantized already ({stored.get('quant_method')}), and what is trained cannot "
            "be added to rounded weights; allowed: the same model in 16 or 32 bits, with quantization=int8 or nf4 to "
            "hold it in fewer"
        )
    if not getattr(lm.config.get_text_config(), "num_attention_heads", None):
        raise ConfigError(
            f"{where}: {name} has no attention heads but a recurrent state, which sampling and scoring here cannot "
            "keep; allowed: a model with attention"
        )
    limit = positions(lm)
    for key, length in lengths.items():
        if limit is not None and length > limit:
            raise ConfigError(f"{key}: {where} ({name}) has {limit} positions; allowed: up to {limit}")


def positions(model: nn.Module) -> int | None:
    """For how many positions a model has a table; None where there is no limit (rotary positions and most ALiBi)."""
    config: Any = model.config
    tables = [m for name, m in model.named_modules() if _holds(name) and isinstance(m, nn.Embedding)]
    limits = [table.num_embeddings - _reserved(table) for table in tables]
    limits += [len(buffer) for name, buffer in model.named_buffers() if _holds(name) and buffer.dim() == 2]
    if config.model_type == "mpt":  # its ALiBi biases are made for so many
        limits.append(config.max_seq_len)
    return min(limits, default=None)


def _holds(name: str) -> bool:
    """Whether a module or buffer of this name is such a table, of text and not of an image or sound."""
    path, _, last = name.rpartition(".")
    return POSITIONS.search(last) is not None and not re.search("vision|audio", path)


def _reserved(table: nn.Embedding) -> int:
    """Rows before that of the first position: OPT says how many, RoBERTa counts from its padding on."""
    padding = table.padding_idx
    return getattr(table, "offset", 0 if padding is None else padding + 1)
