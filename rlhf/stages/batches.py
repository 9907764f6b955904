"""The order in which the rows of the data are visited."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader

from rlhf.seeding import generator


class SeededBatches(BatchSampler):
    """Batches of row numbers as a pure function of (seed, step), so that a run resumes anywhere without replaying.

    Each epoch is a fresh permutation. A batch may straddle two epochs, so that every batch has `batch_size` rows.
    `share` selects the rows of each batch that this process is given.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, steps: int, start: int = 0, share: slice = slice(None)):
        self.rows, self.batch_size, self.seed, self.steps, self.start = rows, batch_size, seed, steps, start
        self.share = share

    def __len__(self) -> int:
        # all steps, also when resuming: Lightning counts on from the batch of the checkpoint
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.steps):
            yield self.batch(step)[self.share]

    def batch(self, step: int) -> list[int]:
        """The rows of one step."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self._permutation(place // self.rows)[place % self.rows] for place in places]

    def _permutation(self, epoch: int) -> list[int]:
        if getattr(self, "_cached", (None,))[0] != epoch:
            self._cached = (epoch, torch.randperm(self.rows, generator=generator(self.seed, "order", epoch)).tolist())
        return self._cached[1]


def loader(rows: Sequence[Any], collate: Callable[[list[Any]], Any], batches: SeededBatches) -> DataLoader:
    """Loads the rows in the order of `batches`."""
    return DataLoader(rows, batch_sampler=batches, collate_fn=collate)  # type: ignore[arg-type]
