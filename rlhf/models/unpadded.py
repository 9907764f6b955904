"""Forward passes without padding: all sequences of a batch lie end to end in one row.

Attention then runs over one sequence at a time. This costs little on a CPU. A GPU would be slowed down by many small
kernels; it gets padded rows of similar length instead (`rlhf.models.sequences.length_buckets`).
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.models.isolated_attention import isolated_attention
from rlhf.models.sequences import Sequences, spans

ATTENTION = "rlhf_unpadded"
TRIED = 4  # tokens per sequence in the trial of a model
# Largest difference between hidden states of a sequence alone and behind another one, relative to the largest state.
TOLERANCE, TOLERANCE_IN_16_BITS = 1e-4, 3e-2


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    bounds: Tensor | None = None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention; with `bounds` (see `isolated_attention`), within each sequence of the row.

    `query`, `key` and `value` are [batch, heads, time, width], the result is [batch, time, heads, width].
    """
    if bounds is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    assert not options.get("dropout"), "a base's dropout is switched off when it is loaded"
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    # Rotary positions may have made query and key float32. Autocast casts them for sdpa, but not for our operator.
    query, key = query.to(value.dtype), key.to(value.dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return isolated_attention(query, key, value, bounds, scale), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def takes_visible(model: PreTrainedModel, tokens: int) -> bool:
    """Whether a boolean mask [batch, 1, query, key] alone decides what the model attends to.

    That is not so for eager attention, which adds a mask to the scores; for sliding windows, which a mask of ours would
    replace; and for ALiBi, which derives distances from a mask [batch, key]. A sliding window of at least `tokens`, the
    length of the longest text, has no effect.
    """
    alibi = getattr(model.config.get_text_config(), "alibi", False)
    return model.config._attn_implementation in ("sdpa", ATTENTION) and not alibi and not _has_window(model, tokens)


def hidden_states(
    model: PreTrainedModel, batch: Sequences, where: Bool[Tensor, "batch time"]
) -> Float[Tensor, "marked hidden"]:
    """Last hidden states at the marked positions, row after row."""
    time = batch.ids.shape[1]
    is_token = spans(torch.zeros_like(batch.lengths), batch.lengths, time)
    positions = batch.position_ids
    if positions is None:
        positions = torch.arange(time, device=batch.ids.device).expand_as(batch.ids)
    return _run(model, batch.ids[is_token], positions[is_token])[where[is_token]]


def _run(
    model: PreTrainedModel, ids: Int[Tensor, "tokens"], positions: Int[Tensor, "tokens"]
) -> Float[Tensor, "tokens hidden"]:
    """Last hidden states of sequences that lie end to end; each starts at a position 0."""
    starts = (positions == 0).nonzero().squeeze(1)
    return model.base_model(
        input_ids=ids[None],
        position_ids=positions[None],
        # transformers passes a mask with four dimensions on as it is. Without one it would make one [tokens, tokens].
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
        bounds=torch.cat([starts, starts.new_tensor([len(ids)])]),
        use_cache=False,
    ).last_hidden_state[0]


@torch.no_grad()
def allow(model: PreTrainedModel) -> bool:
    """Switch a model to this attention if it supports it, and return whether it does.

    The trial compares the hidden states of a sequence alone with those behind another sequence. Models with attention
    other than sdpa, with sliding windows or without attention (state spaces) are left unchanged.
    """
    before = model.config._attn_implementation
    if before == ATTENTION:
        return True
    if before != "sdpa":
        return False
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        model.set_attn_implementation(ATTENTION)
        if model.config._attn_implementation == ATTENTION and not _has_window(model) and _isolates(model):
            return True
    except (TypeError, ValueError, RuntimeError):  # the model's code may not accept the additional arguments
        pass
    finally:
        # One by one, because modules of the same model may be in different modes.
        for module, training in modes:
            module.training = training
    model.set_attn_implementation(before)
    return False


def _has_window(model: PreTrainedModel, tokens: float = math.inf) -> bool:
    """Whether a layer attends to only the last of so many tokens. By default: to only the last of any number.

    The trial itself would not notice, because its sequences are shorter than most windows.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or math.inf
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if window < math.inf:
        kinds.discard("sliding_attention")
    return tokens > window or not kinds <= {"full_attention"}


def _isolates(model: PreTrainedModel) -> bool:
    """Whether a sequence has the same hidden states alone and behind each of two other sequences."""
    ids = torch.arange(3 * TRIED, device=model.device) % model.config.vocab_size
    first, second, other = ids.split(TRIED)
    positions = torch.arange(TRIED, device=ids.device).repeat(2)
    alone = model.base_model(input_ids=second[None], use_cache=False).last_hidden_state[0]
    behind = [_run(model, torch.cat([before, second]), positions)[TRIED:] for before in (first, other)]
    tolerance = (TOLERANCE if alone.dtype.itemsize > 2 else TOLERANCE_IN_16_BITS) * alone.abs().max()
    return all(bool((found - alone).abs().max() <= tolerance) for found in behind)
