"""One decoding step of a batch on a key/value cache, growing with the text or compiled, and the prompts before it.

All classes of steps, `rlhf.rollout.fixed.FixedStep` too, have the interface of `GrowingStep`.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.rollout.kv_cache import BufferCache, cache_argument


class GrowingStep:
    """Attends to the tokens in the cache so far. Finished rows can be dropped in any number.

    `visible` marks the places of the cache that a row attends to. As [batch, 1, 1, capacity] it is the attention mask
    itself, boolean or to be added to scores. As [batch, capacity] it marks the places that hold a token, and the model
    derives its own masks from that (sliding windows, ALiBi).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: BufferCache,
        visible: Bool[Tensor, "batch *one_one capacity"] | Float[Tensor, "batch 1 1 capacity"],
    ):
        self.model, self.cache, self.visible = model, cache, visible
        self.argument = cache_argument(model.base_model)

    def __call__(
        self, token: Int[Tensor, "batch"], positions: Int[Tensor, "batch"], place: int
    ) -> Float[Tensor, "batch hidden"]:
        """Put each row's `token`, at `positions` of its text, into `place` of the cache; return the hidden states."""
        mask = self.visible[..., : place + 1]
        return forward_token(self.model, token[:, None], positions[:, None], mask, self.argument, self.cache)

    def batch_size(self, unfinished: int, place: int) -> int:
        """The size of the batch to continue with at `place` when so many rows (not 0) are unfinished."""
        return unfinished

    def keep(self, rows: Int[Tensor, "rows"]) -> None:
        """Drop all other rows."""
        self.cache.keep(rows)
        self.visible = self.visible[rows]


class CompiledStep(GrowingStep):
    """A `GrowingStep` compiled as a whole, once for any number of rows and any place. Needs sdpa attention.

    `compiled` are the keyword arguments of torch.compile.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: BufferCache,
        visible: Bool[Tensor, "batch 1 1 capacity"],
        compiled: dict[str, Any],
    ):
        super().__init__(model, cache, visible)
        self.run = torch.compile(run_token, **compiled)

    def __call__(
        self, token: Int[Tensor, "batch"], positions: Int[Tensor, "batch"], place: int
    ) -> Float[Tensor, "batch hidden"]:
        """As `GrowingStep`."""
        # The cache is a Python object with a counter that changes in every step. Passing its tensors and the place as
        # tensors keeps the compiled function free of numbers that would make torch.compile start again.
        end = place + 1
        buffers = self.cache.buffers(end)
        where = token.new_tensor([place])
        visible = self.visible[..., :end]
        return self.run(self.model, token[:, None], positions[:, None], visible, self.argument, buffers, where)

    def batch_size(self, unfinished: int, place: int) -> int:
        """At least 2 rows: torch.compile would compile a batch of 1 separately."""
        return 2 if unfinished == 1 else unfinished


def run_token(
    model: PreTrainedModel,
    token: Tensor,
    positions: Tensor,
    visible: Tensor,
    argument: str,
    buffers: list[tuple[Tensor, Tensor]],
    place: Tensor,
) -> Tensor:
    """`forward_token` on the cache's `buffers`, as torch.compile needs it: all that changes by step is in tensors."""
    return forward_token(model, token, positions, visible, argument, BufferCache.of(buffers, place))


def forward_token(
    model: PreTrainedModel, token: Tensor, positions: Tensor, mask: Tensor, argument: str, cache: BufferCache
) -> Tensor:
    """Hidden states [rows, hidden] after one token [rows, 1] per row; `argument` comes from `cache_argument`."""
    return model.base_model(
        input_ids=token, attention_mask=mask, position_ids=positions, use_cache=True, **{argument: cache}
    ).last_hidden_state[:, -1]


def prefill(
    model: PreTrainedModel,
    prompts: Int[Tensor, "batch width"],
    cache: BufferCache,
    held: Bool[Tensor, "batch width"] | None = None,
) -> Float[Tensor, "batch width hidden"]:
    """Run prompts through the model, fill the cache with their keys and values, and return their hidden states.

    For prompts that are padded on the left, `held` marks their tokens. Padding on the right needs no mask, because
    causal attention never looks to the right.
    """
    options: dict[str, Any] = {cache_argument(model.base_model): cache}
    if held is not None:
        options |= {"attention_mask": held.long(), "position_ids": (held.long().cumsum(1) - 1).clamp(min=0)}
    return model.base_model(input_ids=prompts, use_cache=True, **options).last_hidden_state
