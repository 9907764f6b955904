"""Causal attention within each of several sequences that lie end to end in one row.

On a GPU it is one of torch's own kernels for sequences of different lengths: flash attention in 16 bits, the
memory-efficient kernel in float32. They are called by the operators below `torch.nn.attention.varlen`, which torch has
had since before 2.6 and which have derivatives, while that module appeared in 2.10 and changed its arguments since.

torch has no such kernel for the CPU. There it is a single custom operator, so that torch.compile and autograd do not
see a step for each sequence. Inside, it runs torch's flash attention for the CPU, and adjacent sequences of equal
length go through it as one batch. The same operator hides the memory-efficient kernel from torch.compile, because torch
(at least 2.11 to 2.13) cannot trace that kernel's derivative: its own description of it lacks an argument.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.integrations.sdpa_attention import repeat_kv

from rlhf.models.sequences import send

FLASH_WIDTH = 256  # the widest head that flash attention takes; it must also be a multiple of 8
# On a CPU torch's derivative of flash attention in 16 bits is slower than that in float32, casts included, up to about
# so many tokens × head width: four to six times at 32 tokens of width 64, 1.2 times at 256. Beyond, it is faster.
FLOAT_BACKWARD = 256 * 64
CAUSAL = 1  # the memory-efficient kernel's name for a mask that begins at the top left
_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def sequence_starts(positions: Int[Tensor, "tokens"]) -> Int[Tensor, "bounds"]:
    """The start of each sequence, whose positions each begin at 0, and the end of the last."""
    first = (positions == 0).nonzero().squeeze(1)
    return torch.cat([first, first.new_tensor([len(positions)])])


class Bounds(NamedTuple):
    """Where sequences begin: `starts` holds the start of each and the end of the last; `longest` is in tokens."""

    starts: Int[Tensor, "bounds"]
    longest: int

    @classmethod
    def of(cls, positions: Int[Tensor, "tokens"], device: torch.device) -> "Bounds":
        """The bounds of sequences whose positions, on the host, each begin at 0; `starts` is sent to the device."""
        starts = sequence_starts(positions)
        kernels_take = torch.int32 if device.type == "cuda" else torch.int64
        return cls(send(starts.to(kernels_take), device), int(starts.diff().max()))


def isolated_attention(
    query: Float[Tensor, "1 heads time width"],
    key: Float[Tensor, "1 key_heads time width"],
    value: Float[Tensor, "1 key_heads time width"],
    bounds: Bounds,
    scale: float,
) -> Float[Tensor, "1 time heads width"]:
    """softmax(scale · query keyᵀ) value, where a token attends to itself and earlier tokens of its sequence.

    Differentiable. Several heads of `query` may share one of `key` and `value`.

    Raises:
        RuntimeError: torch has no kernel for this dtype and width on this GPU.
    """
    if query.is_cuda:
        takes_flash = query.element_size() == 2 and query.shape[-1] % 8 == 0 and query.shape[-1] <= FLASH_WIDTH
        return (_flash if takes_flash else _memory_efficient)(query, key, value, bounds, scale)
    return _attend(*_with_equal_heads(query, key, value), *bounds, scale)[0]


def _with_equal_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All three as [1, time, heads, width], with a head of keys and values for each head of the query."""
    groups = query.shape[1] // key.shape[1]
    return query.transpose(1, 2), repeat_kv(key, groups).transpose(1, 2), repeat_kv(value, groups).transpose(1, 2)


# -- on a GPU --------------------------------------------------------------------------------------------------------


def _flash(query: Tensor, key: Tensor, value: Tensor, bounds: Bounds, scale: float) -> Tensor:
    """Flash attention, in 16 bits; it takes fewer heads of keys and values as they are."""
    rows = (x[0].transpose(0, 1) for x in (query, key, value))
    starts, longest = bounds
    out = torch.ops.aten._flash_attention_forward(
        *rows, starts, starts, longest, longest, dropout_p=0.0, is_causal=True, return_debug_mask=False, scale=scale
    )
    return out[0][None]


def _memory_efficient(query: Tensor, key: Tensor, value: Tensor, bounds: Bounds, scale: float) -> Tensor:
    attend = _attend if torch.compiler.is_compiling() else _efficient
    return attend(*_with_equal_heads(query, key, value), *bounds, scale)[0]


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """As `_attend`; the sums are [sequences, heads, `longest` rounded up to 32]."""
    found = torch.ops.aten._efficient_attention_forward(
        query, key, value, None, starts, starts, longest, longest, 0.0, CAUSAL, compute_log_sumexp=True, scale=scale
    )
    return found[0], found[1]


# -- the operator ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("rlhf::attend", mutates_args=(), device_types="cpu")
def _attend(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The result and the log-sum-exps of the scores [1, time, heads]; all other tensors are [1, time, heads, width]."""
    runs = _runs(starts)
    inputs = zip(*(_split_runs(x, runs) for x in (query, key, value)), strict=True)
    parts = zip(*(_FORWARD(*states, 0.0, True, scale=scale) for states in inputs), strict=True)
    out, sums = (_join_runs(part) for part in parts)
    return out, sums


_attend.register_kernel("cuda")(_efficient)


@torch.library.custom_op("rlhf::attend_backward", mutates_args=(), device_types="cpu")
def _attend_backward(
    grad: Tensor, states: Sequence[Tensor], out: Tensor, sums: Tensor, starts: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `states`: query, key and value."""
    runs = _runs(starts)
    inputs = zip(*(_split_runs(x, runs) for x in (grad, *states, out, sums)), strict=True)
    parts = zip(*(_flash_backward(each, scale) for each in inputs), strict=True)
    by_query, by_key, by_value = (_join_runs(part) for part in parts)
    return by_query, by_key, by_value


def _flash_backward(states: tuple[Tensor, ...], scale: float) -> list[Tensor]:
    """The gradients of a run, from its gradient, query, key, value, result and log-sum-exps."""
    *halves, sums = states
    dtype, (length, width) = halves[0].dtype, halves[0].shape[-2:]
    if dtype.itemsize == 2 and length * width <= FLOAT_BACKWARD:
        halves = [half.float() for half in halves]
    return [gradient.to(dtype) for gradient in _BACKWARD(*halves, sums, 0.0, True, scale=scale)]


@_attend_backward.register_kernel("cuda")
def _(
    grad: Tensor, states: Sequence[Tensor], out: Tensor, sums: Tensor, starts: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.empty(
        (), dtype=torch.long, device=grad.device
    )  # the random state of dropout, of which there is none
    gradients = torch.ops.aten._efficient_attention_backward(
        grad.contiguous(), *states, None, out, starts, starts, longest, longest, sums, 0.0, unused, unused, CAUSAL,
        False, scale=scale,
    )  # fmt: skip
    return gradients[0], gradients[1], gradients[2]


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
def _(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float) -> tuple[Tensor, Tensor]:
    shape: tuple[int, ...] = query.shape[:3]
    if query.is_cuda:
        shape = (starts.shape[0] - 1, query.shape[2], (longest + 31) // 32 * 32)
    return _empty_like(query), query.new_empty(shape, dtype=torch.promote_types(query.dtype, torch.float32))


@_attend_backward.register_fake
def _(
    grad: Tensor, states: Sequence[Tensor], out: Tensor, sums: Tensor, starts: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = states
    return _empty_like(query), _empty_like(key), _empty_like(value)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *states, starts, ctx.longest, ctx.scale = inputs
    ctx.save_for_backward(*states, *output, starts)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *states, out, sums, starts = ctx.saved_tensors
    return *_attend_backward(grad, states, out, sums, starts, ctx.longest, ctx.scale), None, None, None


_attend.register_autograd(_backward, setup_context=_save_for_backward)
