"""Causal attention within each of several sequences that lie end to end in one row, on the CPU.

It is a single custom operator, so that torch.compile and autograd do not see a step for each sequence. Inside, it runs
torch's flash attention for the CPU. Adjacent sequences of equal length go through it as one batch.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def isolated_attention(
    query: Float[Tensor, "1 heads time width"],
    key: Float[Tensor, "1 heads time width"],
    value: Float[Tensor, "1 heads time width"],
    bounds: Int[Tensor, "bounds"],
    scale: float,
) -> Float[Tensor, "1 time heads width"]:
    """softmax(scale · query keyᵀ) value, where a token attends to itself and earlier tokens of its sequence.

    Differentiable. `bounds` holds the start of each sequence and the end of the last: 0, …, time.
    """
    return _attend(*(x.transpose(1, 2) for x in (query, key, value)), bounds, scale)[0]


@torch.library.custom_op("rlhf::attend", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The result and the log-sum-exps of the scores [1, time, heads]; all other tensors are [1, time, heads, width]."""
    runs = _runs(bounds)
    inputs = zip(*(_split_runs(x, runs) for x in (query, key, value)), strict=True)
    parts = zip(*(_FORWARD(*states, 0.0, True, scale=scale) for states in inputs), strict=True)
    out, sums = (_join_runs(part) for part in parts)
    return out, sums


@torch.library.custom_op("rlhf::attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, bounds: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    runs = _runs(bounds)
    inputs = zip(*(_split_runs(x, runs) for x in (grad, query, key, value, out, sums)), strict=True)
    parts = zip(*(_BACKWARD(*states, 0.0, True, scale=scale) for states in inputs), strict=True)
    by_query, by_key, by_value = (_join_runs(part) for part in parts)
    return by_query, by_key, by_value


def _runs(bounds: Tensor) -> list[tuple[int, int]]:
    """(count, length) of each run of adjacent sequences of equal length."""
    values, counts = torch.unique_consecutive(bounds.diff(), return_counts=True)
    return list(zip(counts.tolist(), values.tolist(), strict=True))


def _split_runs(states: Tensor, runs: list[tuple[int, int]]) -> list[Tensor]:
    """Split [1, time, heads, ...] into a view [count, heads, length, ...] for each run."""
    parts = states.split([count * length for count, length in runs], dim=1)
    return [
        (part if count == 1 else part[0].unflatten(0, (count, length))).transpose(1, 2)
        for part, (count, length) in zip(parts, runs, strict=True)
    ]


def _join_runs(parts: tuple[Tensor, ...]) -> Tensor:
    """The inverse of `_split_runs`: join runs to [1, time, heads, ...]."""
    rows = [part.transpose(1, 2) for part in parts]
    rows = [row if len(row) == 1 else row.flatten(0, 1)[None] for row in rows]
    return torch.cat(rows, dim=1) if len(rows) > 1 else rows[0].contiguous()


def _empty_like(states: Tensor) -> Tensor:
    return torch.empty_like(states, memory_format=torch.contiguous_format)


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _empty_like(query), query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))


@_attend_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, bounds: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(query), _empty_like(key), _empty_like(value)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *states, bounds, ctx.scale = inputs
    ctx.save_for_backward(*states, *output, bounds)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, out, sums, bounds = ctx.saved_tensors
    return *_attend_backward(grad, query, key, value, out, sums, bounds, ctx.scale), None, None


_attend.register_autograd(_backward, setup_context=_save_for_backward)
