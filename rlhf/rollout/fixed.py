"""Decoding at fixed shapes and memory addresses, as CUDA graphs need it."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.rollout.decoding import GrowingStep, run_token
from rlhf.rollout.graphs import StepRecorder
from rlhf.rollout.kv_cache import BufferCache

BLOCK = 64  # steps that attend to the same part of the cache, about
ROUNDING = 8  # blocks are a multiple of it, so that `native.CHECK_EVERY` divides them; kernels want masks aligned to it


class FixedStep(GrowingStep):
    """All steps of a block have the same shapes and addresses: they attend to what the block can fill, under a mask.

    Longer blocks would attend to more places in vain, shorter ones would be recorded more often. For the same reason
    the batch shrinks only between blocks, and to powers of two. Needs sdpa attention.

    With `capture`, the steps of a block run as a CUDA graph (see `StepRecorder`). The steps themselves are tested on
    the CPU. They are not compiled: for 30 blocks torch.compile takes more than 85 s on a GPU (benchmarks/RESULTS.md).
    """

    def __init__(
        self, model: PreTrainedModel, cache: BufferCache, visible: Bool[Tensor, "batch 1 1 capacity"], capture: bool
    ):
        self.end, self.capacity = cache.get_seq_length(), visible.shape[-1]
        self.block = block_length(self.capacity - self.end)
        super().__init__(model, cache, _bias(visible, self.end, cache.value_dtype))
        rows, device = len(visible), visible.device
        self.token = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros_like(self.token)
        self.place = torch.zeros(1, dtype=torch.long, device=device)
        self.recorder = StepRecorder(type(model).__name__) if capture else None
        cache.clear_the_rest()

    def __call__(
        self, token: Int[Tensor, "batch"], positions: Int[Tensor, "batch"], place: int
    ) -> Float[Tensor, "batch hidden"]:
        """As `GrowingStep`; a recorded step overwrites the result of the previous one."""
        if place >= self.end:
            self.end = min(place + self.block, self.capacity)
            if self.recorder:
                self.recorder.start_again()
        self.token.copy_(token[:, None])
        self.positions.copy_(positions[:, None])
        self.place.fill_(place)
        return self.recorder(self.step) if self.recorder else self.step()

    def step(self) -> Float[Tensor, "batch hidden"]:
        """One step on the buffers alone."""
        self.visible.index_fill_(-1, self.place, 0.0)
        mask, buffers = self.visible[..., : self.end], self.cache.buffers(self.end)
        return run_token(self.model, self.token, self.positions, mask, self.argument, buffers, self.place)

    def batch_size(self, unfinished: int, place: int) -> int:
        """At the start of a block the next power of two, so that few sizes occur; within a block the present size."""
        if place < self.end:
            return len(self.token)
        return 1 << (unfinished - 1).bit_length()

    def keep(self, rows: Int[Tensor, "rows"]) -> None:
        """Drop all other rows. Only at the start of a block."""
        super().keep(rows)
        self.token, self.positions = self.token[rows], self.positions[rows]


def block_length(steps: int) -> int:
    """Steps per block if `steps` are to be divided into blocks of about `BLOCK` and about equal length."""
    blocks = max(1, round(steps / BLOCK))
    return math.ceil(steps / blocks / ROUNDING) * ROUNDING


def _bias(
    visible: Bool[Tensor, "batch 1 1 capacity"], filled: int, dtype: torch.dtype
) -> Float[Tensor, "batch 1 1 more"]:
    """What a mask adds to scores: 0 for the visible ones of the filled places, else -inf.

    sdpa would make it from a boolean mask in each layer. Its rows are aligned, or kernels would copy them.
    """
    columns = math.ceil(visible.shape[-1] / ROUNDING) * ROUNDING
    bias = torch.full((len(visible), 1, 1, columns), -torch.inf, dtype=dtype, device=visible.device)
    bias[..., :filled].masked_fill_(visible[..., :filled], 0.0)
    return bias
