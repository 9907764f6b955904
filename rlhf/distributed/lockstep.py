"""Lockstep of sharded forward passes: processes may need different numbers of them between two collectives.

A forward pass through a sharded base gathers the weights of each block from all processes, so all processes have to
make it together. Their batches differ, however, and so does the number of passes that each needs. As in torch's `Join`
(torch.distributed.algorithms.join), a process that is done early shadows the passes of the others: every pass is
announced by an all-reduce, and a process that waits at the next collective answers each announcement with the smallest
possible forward pass of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")
_shadow_pass: list[Callable[[], Any]] = []  # empty: no sharded base in use, nothing to announce


def enable(base: nn.Module, shadow_pass: Callable[[], Any]) -> None:
    """Announce every forward pass through `base` from now on.

    Args:
        base: a module whose weights are sharded over all processes.
        shadow_pass: makes the smallest forward pass through `base`; called while other processes still need theirs.
    """

    def announce(*_: Any) -> None:
        if _shadow_pass:
            _count_passing(1)

    base.register_forward_pre_hook(announce)
    _shadow_pass[:] = [shadow_pass]


def disable() -> None:
    """Stop announcing passes: the sharded base is not used any more."""
    _shadow_pass.clear()


@torch.no_grad()
def join() -> None:
    """Shadow the forward passes of the other processes until all have arrived here.

    Called before every collective. Returns at once if no base is sharded.
    """
    shadow_pass = _shadow_pass[:]
    while shadow_pass and _count_passing(0):
        _shadow_pass.clear()  # the shadow pass itself must not be announced
        shadow_pass[0]()
        _shadow_pass[:] = shadow_pass


def _count_passing(passes: int) -> int:
    """How many processes are about to make a forward pass; this one makes `passes` (0 or 1)."""
    count = torch.tensor(passes)
    dist.all_reduce(count)
    return int(count)


def filler_parts(parts: Sequence[T]) -> list[T]:
    """Repeats of the last part, as many as this process has fewer parts than the process with the most.

    Backward passes gather weights too, but are not announced, so every process must make the same number of them. Call
    this before the first backward pass of an optimiser step; the loss of a filler part counts zero times.
    """
    if not _shadow_pass:
        return []
    join()
    most = torch.tensor(len(parts))
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return [parts[-1]] * (int(most) - len(parts))
