"""Forward passes without padding: all sequences of a batch lie end to end in one row.

Attention then runs within each sequence (`rlhf.models.isolated_attention`), on a CPU and on a GPU. A model that cannot
be run this way gets padded rows of similar length instead (`rlhf.models.sequences.length_buckets`).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.models.blocks import evaluating
from rlhf.models.isolated_attention import Bounds, isolated_attention, sequence_starts
from rlhf.models.last_block import WORTHWHILE, only_rows, row_modules
from rlhf.models.sequences import Sequences, send, spans

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
    model: PreTrainedModel, batch: Sequences, where: Bool[Tensor, "batch time"], row_modules: Sequence[str] = ()
) -> Float[Tensor, "marked hidden"]:
    """Last hidden states at the marked positions, row after row.

    Sequences of equal length come to lie side by side, where the CPU's attention takes them as one batch. If the marked
    positions are few enough, the `row_modules` of the last block run on them alone (`rlhf.models.last_block`).
    """
    time = batch.ids.shape[1]
    is_token = spans(torch.zeros_like(batch.lengths), batch.lengths, time)
    positions = torch.arange(time).expand_as(batch.ids) if batch.position_ids is None else batch.position_ids
    ids, positions, read = batch.ids[is_token], positions[is_token], where[is_token]
    order = _by_length(positions)
    rows = send(order.argsort()[read], model.device)
    few = len(rows) <= WORTHWHILE * len(ids)
    with only_rows(model, row_modules if few else (), rows, len(ids)):
        return _run(model, ids[order], positions[order]).index_select(0, rows)


def _by_length(positions: Int[Tensor, "tokens"]) -> Int[Tensor, "tokens"]:
    """The order in which sequences of equal length, each of which starts at a position 0, are side by side."""
    lengths = sequence_starts(positions).diff()
    return lengths.repeat_interleave(lengths).argsort(stable=True)


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
    with evaluating(model):
        try:
            model.set_attn_implementation(ATTENTION)
            if model.config._attn_implementation == ATTENTION and not _has_window(model) and _isolates(model):
                return True
        except (TypeError, ValueError, RuntimeError):  # the model's code may not accept the additional arguments
            pass
    model.set_attn_implementation(before)
    return False


@torch.no_grad()
def agreeing_row_modules(model: PreTrainedModel) -> list[str]:
    """The `row_modules` of a model that runs without padding; none if its states at some tokens are others with them.

    The trial is in evaluation mode and leaves the model as it was.
    """
    paths = row_modules(model)
    ids = torch.arange(2 * TRIED) % model.config.vocab_size
    positions, rows = torch.arange(TRIED).repeat(2), torch.tensor([1, TRIED - 1, TRIED], device=model.device)
    with evaluating(model):
        try:
            everywhere = _run(model, ids, positions)[rows]
            with only_rows(model, paths, rows, len(ids)):
                found = _run(model, ids, positions)[rows]
        except (AttributeError, IndexError, TypeError, RuntimeError):  # a module takes or gives something else
            return []
    return paths if _close(found, everywhere) else []


def _close(found: Tensor, expected: Tensor) -> bool:
    tolerance = (TOLERANCE if expected.dtype.itemsize > 2 else TOLERANCE_IN_16_BITS) * expected.abs().max()
    return bool((found - expected).abs().max() <= tolerance)


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
    return all(_close(found, alone) for found in behind)
