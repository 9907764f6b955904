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
    prompts: Sequence[str], size: int, seed: int, step: int, samples: int = 1
) -> tuple[list[str], list[Int[Tensor, "_"]]]:
    """The prompts of this process, each `samples` times, and which of these rows belong to a minibatch of `size` rows.

    Prompts are assigned at random; each process has as equal a share of every minibatch as their number allows. All
    rows of a prompt are of one process and one minibatch.
    """
    order = torch.randperm(len(prompts), generator=generator(seed, "deal", step))
    shares = [rows[collectives.rank() :: collectives.size()] for rows in order.split(size // samples)]
    own = torch.cat(shares).sort().values
    places = [torch.searchsorted(own, share.contiguous()) for share in shares]
    rows_of = [(place[:, None] * samples + torch.arange(samples)).flatten() for place in places]
    return [prompts[row] for row in own.tolist() for _ in range(samples)], rows_of


def number_microbatches(minibatches: Sequence[Sequence[Int[Tensor, "_"]]]) -> list[Minibatch]:
    """Count the micro-batches of all minibatches: the numbers name their dropout masks, the same in every epoch."""
    numbered, count = [], 0
    for parts in minibatches:
        numbered.append([Microbatch(count + i, rows) for i, rows in enumerate(parts)])
        count += len(parts)
    return numbered
