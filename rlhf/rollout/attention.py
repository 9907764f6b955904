"""Attention in decoding: query heads that share keys and values (grouped-query attention) read them once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "rlhf_grouped"


def attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch shared keys width"],
    value: Float[Tensor, "batch shared keys value_width"],
    attention_mask: Bool[Tensor, "batch 1 queries keys"] | Float[Tensor, "batch 1 queries keys"],
    scaling: float | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "batch queries heads value_width"], None]:
    """transformers' sdpa attention for one token (query) per row.

    The heads of a group become queries of one head. The products are the same, but nothing is copied, whereas sdpa
    under a mask needs a copy of the keys and values for each head on a GPU.
    """
    if options.get("softcap") is not None or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    assert query.shape[2] == 1, "several tokens per row would see each other"
    packed = query.unflatten(1, (key.shape[1], -1)).squeeze(3)
    found = scaled_dot_product_attention(packed, key, value, attn_mask=attention_mask, scale=scaling)
    return found.flatten(1, 2)[:, None], None


AttentionInterface.register(GROUPED, attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


@contextmanager
def grouped_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block, `model` decodes with `attention` if several of its heads share keys and values.

    Only for models with sdpa attention, one token per row and a mask [batch, 1, 1, keys].
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if getattr(config, "num_key_value_heads", None) in (None, heads):
        yield
        return
    before = model.config._attn_implementation
    model.set_attn_implementation(GROUPED)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
