"""Collectives of a run: rank and world size, sums, gathered objects, and work that only rank 0 does.

Every process goes through the same stages with its own share of each batch. Decisions that must agree (is a model in
the cache? what did the judge answer?) are made by rank 0 and broadcast. In a run of one process, all functions here
return their argument or call it directly.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf.distributed import lockstep

T = TypeVar("T")
BUCKET = 2**24  # elements per all-reduce: 64 MiB of float32
_on_rank_zero: list[bool] = []  # not empty while rank 0 runs a function that the others do not call


# -- rank and world size ---------------------------------------------------------------------------------------------


def rank() -> int:
    """The global rank of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """The world size: how many processes work on this run; 1 inside `on_rank_zero`, where no other process listens."""
    return dist.get_world_size() if dist.is_initialized() and not _on_rank_zero else 1


def is_rank_zero() -> bool:
    """Whether this is the process that makes decisions and writes files."""
    return rank() == 0


# -- collectives -----------------------------------------------------------------------------------------------------


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of `x` over all processes, as a new tensor of the same shape (`x` itself in a run of one process)."""
    if size() == 1:
        return x
    lockstep.join()
    x = x.clone()
    dist.all_reduce(x)
    return x


def all_reduce_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in buckets of at most `BUCKET` elements."""
    if size() == 1:
        return
    lockstep.join()
    # dict.fromkeys, because the order of a set can differ between processes
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        for bucket in _buckets([tensor for tensor in tensors if tensor.dtype == dtype]):
            flat = torch.cat([member.flatten() for member in bucket])
            dist.all_reduce(flat)
            for member, summed in zip(bucket, flat.split([member.numel() for member in bucket]), strict=True):
                member.copy_(summed.view_as(member))


@torch.no_grad()
def broadcast_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by that of rank 0."""
    if size() == 1:
        return
    lockstep.join()
    for tensor in tensors:
        dist.broadcast(tensor, 0)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors in groups of at most `BUCKET` elements; a larger tensor is a group of its own."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(map(torch.numel, bucket)) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def all_gather(value: T) -> list[T]:
    """The `value` of every process (any object that can be pickled), in order of rank."""
    if size() == 1:
        return [value]
    lockstep.join()
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def on_rank_zero(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 only, and return its result, or raise its exception, on every process.

    Exceptions of this package are raised as they are; others reach the other processes as a RuntimeError with the same
    message.
    """
    if size() == 1:
        return make()
    value, failure = None, None
    if is_rank_zero():
        _on_rank_zero.append(True)
        try:
            value = make()
        except Exception as error:
            failure = error
        finally:
            _on_rank_zero.pop()
    lockstep.join()
    message: list[Any] = [(value, failure and _picklable(failure))]
    dist.broadcast_object_list(message)
    if failure is not None:  # on rank 0 itself: the original exception has its traceback
        raise failure
    value, failure = message[0]
    if failure is not None:
        raise failure
    return value


def _picklable(error: Exception) -> Exception:
    """The exception itself if it is ours and holds plain values, else a RuntimeError with its message."""
    plain = type(error).__module__.startswith("rlhf.") and all(isinstance(part, str | int) for part in error.args)
    return error if plain else RuntimeError(f"{type(error).__name__}: {error}")
