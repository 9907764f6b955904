"""Forward passes without padding: all sequences of a batch lie end to end in one row.

Attention then runs within each sequence (`rlhf.models.isolated_attention`), on a CPU and on a GPU. A model that cannot
be run this way gets padded rows of similar length instead (`rlhf.models.sequences.length_buckets`).
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.models.isolated_attention import Bounds, isolated_attention
from rlhf.models.sequences import Sequences, select, send, spans

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
    bounds: Bounds | None = None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention; with `bounds`, within each sequence of the row.

    `query`, `key` and `value` are [batch, heads, time, width], the result is [batch, time, heads, width].
    """
    if bounds is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    assert not options.get("dropout"), "a base's dropout is switched off when it is loaded"
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
    positions = torch.arange(time).expand_as(batch.ids) if batch.position_ids is None else batch.position_ids
    return select(_run(model, batch.ids[is_token], positions[is_token]), where[is_token])


def _run(
    model: PreTrainedModel, ids: Int[Tensor, "tokens"], positions: Int[Tensor, "tokens"]
) -> Float[Tensor, "tokens hidden"]:
    """Last hidden states, on the device, of sequences on the host that lie end to end; each starts at a position 0."""
    device = model.device
    return model.base_model(
        input_ids=send(ids, device)[None],
        position_ids=send(positions, device)[None],
        # transformers passes a mask with four dimensions on as it is. Without one it would make one [tokens, tokens].
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        bounds=Bounds.of(positions, device),
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
    ids = torch.arange(3 * TRIED) % model.config.vocab_size
    first, second, other = ids.split(TRIED)
    positions = torch.arange(TRIED).repeat(2)
    alone = model.base_model(input_ids=second[None].to(model.device), use_cache=False).last_hidden_state[0]
    behind = [_run(model, torch.cat([before, second]), positions)[TRIED:] for before in (first, other)]
    tolerance = (TOLERANCE if alone.dtype.itemsize > 2 else TOLERANCE_IN_16_BITS) * alone.abs().max()
    return all(bool((found - alone).abs().max() <= tolerance) for found in behind)
