"""How a rollout batch is split: into minibatches of one optimiser step each, and those into micro-batches."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from rlhf.distributed import collectives
from rlhf.seeding import generator


class Microbatch(NamedTuple):
    """Rows of the rollout batch that go through the model together; `number` counts micro-batches through the batch."""

    number: int
    rows: Int[Tensor, "_"]


Minibatch = list[Microbatch]


def split_minibatches(
    prompts: Sequence[str], size: int, seed: int, step: int
) -> tuple[list[str], list[Int[Tensor, "_"]]]:
    """The prompts of this process, and which of them belong to each minibatch of `size` prompts.

    Prompts are assigned at random; each process has as equal a share of every minibatch as their number allows.
    """
    order = torch.randperm(len(prompts), generator=generator(seed, "deal", step))
    shares = [rows[collectives.rank() :: collectives.size()] for rows in order.split(size)]
    own = torch.cat(shares).sort().values
    return [prompts[row] for row in own.tolist()], [torch.searchsorted(own, share.contiguous()) for share in shares]


def number_microbatches(minibatches: Sequence[Sequence[Int[Tensor, "_"]]]) -> list[Minibatch]:
    """Count the micro-batches of all minibatches: the numbers name their dropout masks, the same in every epoch."""
    numbered, count = [], 0
    for parts in minibatches:
        numbered.append([Microbatch(count + i, rows) for i, rows in enumerate(parts)])
        count += len(parts)
    return numbered
