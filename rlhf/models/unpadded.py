"""Sequences laid end to end in one row, so that nothing is computed on padding.

Attention then goes over one sequence at a time. On a CPU that costs little; a GPU, which would wait for each of the
many small kernels, is given padded rows of similar length instead (`rlhf.models.sequences.length_buckets`).
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
TRIED = 4  # tokens of each sequence that a model is tried out on
CLOSE, CLOSE_IN_16_BITS = 1e-4, 3e-2  # how far its states may be from those alone, of the largest


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
    """As transformers' sdpa; given where the sequences in a row begin and end, of each of them alone.

    `query`, `key` and `value` are [batch, heads, time, width], the result [batch, time, heads, width].
    """
    if bounds is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    assert not options.get("dropout"), "a base's dropout is switched off when it is loaded"
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast does so for sdpa; positions may be in float32
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return isolated_attention(query, key, value, bounds, scale), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def takes_visible(model: PreTrainedModel, tokens: int) -> bool:
    """Whether all its attention is over what a boolean mask [batch, 1, query, key] says is visible, and nothing else.

    Eager attention adds a mask to the scores, sliding windows would vanish under a mask of ours, and ALiBi counts
    distances off a mask [batch, key]. A window that reaches further than the longest text, of `tokens`, does nothing.
    """
    alibi = getattr(model.config.get_text_config(), "alibi", False)
    return model.config._attn_implementation in ("sdpa", ATTENTION) and not alibi and not _slides(model, tokens)


def hidden_states(
    model: PreTrainedModel, batch: Sequences, where: Bool[Tensor, "batch time"]
) -> Float[Tensor, "marked hidden"]:
    """Last hidden states of the marked positions, row after row."""
    time = batch.ids.shape[1]
    kept = spans(torch.zeros_like(batch.lengths), batch.lengths, time)
    positions = batch.position_ids
    if positions is None:
        positions = torch.arange(time, device=batch.ids.device).expand_as(batch.ids)
    return _run(model, batch.ids[kept], positions[kept])[where[kept]]


def _run(
    model: PreTrainedModel, ids: Int[Tensor, "tokens"], positions: Int[Tensor, "tokens"]
) -> Float[Tensor, "tokens hidden"]:
    starts = (positions == 0).nonzero().squeeze(1)
    return model.base_model(
        input_ids=ids[None],
        position_ids=positions[None],
        # transformers leaves a mask of four dimensions as it is: it would make one of [tokens, tokens] otherwise
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
        bounds=torch.cat([starts, starts.new_tensor([len(ids)])]),
        use_cache=False,
    ).last_hidden_state[0]


@torch.no_grad()
def allow(model: PreTrainedModel) -> bool:
    """Let a model run so if it can: what is tried out on it is whether a sequence is what it is alone.

    A model whose attention is not sdpa, slides over the text, or is none at all (a state space) is left as it was.
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
        if model.config._attn_implementation == ATTENTION and not _slides(model) and _isolates(model):
            return True
    except (TypeError, ValueError, RuntimeError):  # whatever its code says to arguments it does not know
        pass
    finally:
        for module, training in modes:  # adapters may train in a trunk that does not
            module.training = training
    model.set_attn_implementation(before)
    return False


def _slides(model: PreTrainedModel, tokens: float = math.inf) -> bool:
    """Whether a layer sees only the last of so many tokens; by default more than are tried out, where it would hide."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or math.inf
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if window < math.inf:
        kinds.discard("sliding_attention")
    return tokens > window or not kinds <= {"full_attention"}


def _isolates(model: PreTrainedModel) -> bool:
    ids = torch.arange(3 * TRIED, device=model.device) % model.config.vocab_size
    first, second, other = ids.split(TRIED)
    positions = torch.arange(TRIED, device=ids.device).repeat(2)
    alone = model.base_model(input_ids=second[None], use_cache=False).last_hidden_state[0]
    behind = [_run(model, torch.cat([before, second]), positions)[TRIED:] for before in (first, other)]
    room = (CLOSE if alone.dtype.itemsize > 2 else CLOSE_IN_16_BITS) * alone.abs().max()
    return all(bool((found - alone).abs().max() <= room) for found in behind)
