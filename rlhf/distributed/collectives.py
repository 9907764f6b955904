"""Several processes on one run: which of them this is, what they add up, how they are started.

Every process walks through the same stages with its own share of each batch; what is decided once (is it built already?
what did the judge say?) is decided by the first and told to the others. Alone, everything here is the identity.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
BUCKET = 2**24  # numbers added up at once: 64 MiB of float32
_by_itself: list[bool] = []
_least: list[Callable[[], Any]] = []  # the smallest pass through a base that is spread over the processes


# -- who we are ------------------------------------------------------------------------------------------------------


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes work on this run; 1 inside of what the first does for all (`from_first`)."""
    return dist.get_world_size() if dist.is_initialized() and not _by_itself else 1


def is_rank_zero() -> bool:
    """Whether this is the process that decides and writes."""
    return rank() == 0


# -- what they tell each other ---------------------------------------------------------------------------------------


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of `x` over the processes."""
    if size() == 1:
        return x
    catch_up()
    x = x.clone()
    dist.all_reduce(x)
    return x


def all_reduce_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the processes, in few messages."""
    if size() == 1:
        return
    catch_up()
    for kind in dict.fromkeys(tensor.dtype for tensor in tensors):  # a set has another order in each process
        for bucket in _buckets([tensor for tensor in tensors if tensor.dtype == kind]):
            flat = torch.cat([member.flatten() for member in bucket])
            dist.all_reduce(flat)
            for member, summed in zip(bucket, flat.split([member.numel() for member in bucket]), strict=True):
                member.copy_(summed.view_as(member))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in turn, together while they hold no more numbers than `BUCKET`."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(map(torch.numel, bucket)) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def all_gather(value: T) -> list[T]:
    """What every process holds, in their order."""
    if size() == 1:
        return [value]
    catch_up()
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def on_rank_zero(make: Callable[[], T]) -> T:
    """What `make` gives, or raises, in the first process; the others do not call it."""
    if size() == 1:
        return make()
    value, failure = None, None
    if is_rank_zero():
        _by_itself.append(True)
        try:
            value = make()
        except Exception as error:
            failure = error
        finally:
            _by_itself.pop()
    catch_up()
    told: list[Any] = [(value, failure and _portable(failure))]
    dist.broadcast_object_list(told)
    if failure is not None:  # with its own traceback
        raise failure
    value, failure = told[0]
    if failure is not None:
        raise failure
    return value


def _portable(error: Exception) -> Exception:
    """One of our own exceptions as it is; of another, which may hold anything, what it says."""
    plain = type(error).__module__.startswith("rlhf.") and all(isinstance(part, str | int) for part in error.args)
    return error if plain else RuntimeError(f"{type(error).__name__}: {error}")


# -- in step ---------------------------------------------------------------------------------------------------------


def keep_step(base: nn.Module, least: Callable[[], Any]) -> None:
    """From now on a pass through `base` is one of all processes, as each holds but a share of its weights.

    How many passes each has to make between two messages is its own affair: a process announces every pass, and those
    that have come to the next message already make the smallest one, `least`, along with it.
    """

    def announce(*_: Any) -> None:
        if _least:
            _busy(1)

    base.register_forward_pre_hook(announce)
    _least[:] = [least]


def part_ways() -> None:
    """The base that the processes passed through together is not used any more."""
    _least.clear()


@torch.no_grad()
def catch_up() -> None:
    """Make passes along with the other processes until all have come here; at once where each has its own base."""
    own = _least[:]
    while own and _busy(0):
        _least.clear()  # nothing to announce
        own[0]()
        _least[:] = own


def _busy(passes: int) -> int:
    """How many processes pass through the base now."""
    count = torch.tensor(passes)
    dist.all_reduce(count)
    return int(count)


def to_fill_up(parts: Sequence[T]) -> list[T]:
    """Parts to go through once more, as another process has more of them and backward passes are in step, too.

    To be asked before the first backward pass: those are not announced.
    """
    return [parts[-1]] * (max(all_gather(len(parts))) - len(parts)) if _least else []


# -- how they come to be ---------------------------------------------------------------------------------------------
