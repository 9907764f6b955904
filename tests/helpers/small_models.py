"""Models of two blocks, of any architecture, with weights large enough that tokens matter to each other."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SMALL = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, "use_cache": True,
    "initializer_range": 0.25,
}  # fmt: skip


def small(kind: str, **options: object) -> PreTrainedModel:
    """The same random weights for the same options, in evaluation mode."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **options})).eval()
