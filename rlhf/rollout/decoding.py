"""One decoding step of a batch on a key/value cache: growing with the text, compiled, or at fixed shapes.

All classes of steps have the interface of `GrowingStep`.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.rollout.kv_cache import BufferCache, cache_argument

log = logging.getLogger(__name__)
WARM_UP = 2  # steps before a capture: libraries initialise themselves in their first calls


class GrowingStep:
    """Attends to the tokens in the cache so far. Finished rows can be dropped in any number.

    `visible` marks the places of the cache that a row attends to. As [batch, 1, 1, capacity] it is the attention mask
    itself. As [batch, capacity] it marks the places that hold a token, and the model derives its own masks from that
    (sliding windows, ALiBi).
    """

    def __init__(self, model: PreTrainedModel, cache: BufferCache, visible: Bool[Tensor, "batch *one_one capacity"]):
        self.model, self.cache, self.visible = model, cache, visible
        self.argument = cache_argument(model.base_model)

    def __call__(
        self, token: Int[Tensor, "batch"], positions: Int[Tensor, "batch"], place: int
    ) -> Float[Tensor, "batch hidden"]:
        """Put each row's `token`, at `positions` of its text, into `place` of the cache; return the hidden states."""
        mask = self.visible[..., : place + 1]
        return _forward(self.model, token[:, None], positions[:, None], mask, self.argument, self.cache)

    def remaining(self, finished: Bool[Tensor, "batch"]) -> Int[Tensor, "rows"]:
        """The rows to continue with: all unfinished ones, and finished ones to fill a batch of `batch_size`.

        Empty once all rows are finished.
        """
        return finished.argsort(stable=True)[: self.batch_size(int((~finished).sum()))]

    def batch_size(self, unfinished: int) -> int:
        """The size of the batch to continue with when so many rows are unfinished."""
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
        self.run = torch.compile(_step, **compiled)

    def __call__(
        self, token: Int[Tensor, "batch"], positions: Int[Tensor, "batch"], place: int
    ) -> Float[Tensor, "batch hidden"]:
        """As `GrowingStep`."""
        # The cache is a Python object with a counter that changes in every step. Passing its tensors and the place as
        # tensors keeps the compiled function free of numbers that would make torch.compile start again.
        end = place + 1
        buffers = [(layer.keys[:, :, :end], layer.values[:, :, :end]) for layer in self.cache.layers]
        where = token.new_tensor([place])
        visible = self.visible[..., :end]
        return self.run(self.model, token[:, None], positions[:, None], visible, self.argument, buffers, where)

    def batch_size(self, unfinished: int) -> int:
        """At least 2 rows: torch.compile would compile a batch of 1 separately."""
        return 2 if unfinished == 1 else unfinished


def _step(
    model: PreTrainedModel,
    token: Tensor,
    positions: Tensor,
    visible: Tensor,
    argument: str,
    buffers: list[tuple[Tensor, Tensor]],
    place: Tensor,
) -> Tensor:
    """The function that `CompiledStep` compiles; all that changes from step to step is in tensors."""
    return _forward(model, token, positions, visible, argument, BufferCache.of(buffers, place))


def _forward(
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


class FixedStep(GrowingStep):
    """Attends to the whole capacity under a mask, so that every step has the same shapes and memory addresses.

    With `capture`, the step is recorded once as a CUDA graph and replayed, which saves launching each kernel. The batch
    shrinks to powers of two only, and is captured again each time. A graph contains the addresses of the weights, too:
    it is invalid once the merged adapter is removed from them. Needs sdpa attention. NOT MEASURED, because no GPU was
    available; the steps themselves are tested on the CPU.
    """

    def __init__(
        self, model: PreTrainedModel, cache: BufferCache, visible: Bool[Tensor, "batch 1 1 capacity"], capture: bool
    ):
        visible[..., cache.get_seq_length() :] = False
        super().__init__(model, cache, visible)
        rows, device = len(visible), visible.device
        self.token = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros_like(self.token)
        self.place = torch.zeros(1, dtype=torch.long, device=device)
        self.capture = capture
        self.run: Callable[[], Tensor] | None = None
        cache.fix(self.place)

    def __call__(
        self, token: Int[Tensor, "batch"], positions: Int[Tensor, "batch"], place: int
    ) -> Float[Tensor, "batch hidden"]:
        """As `GrowingStep`; a captured step overwrites the result of the previous one."""
        self.token.copy_(token[:, None])
        self.positions.copy_(positions[:, None])
        self.place.fill_(place)
        if self.run is None:
            self.run = captured(self.step) if self.capture else self.step
        return self.run()

    def step(self) -> Float[Tensor, "batch hidden"]:
        """One step on the buffers alone. It can be repeated without effect, as the warm-up before a capture does."""
        self.visible.index_fill_(-1, self.place, True)
        return _forward(self.model, self.token, self.positions, self.visible, self.argument, self.cache)

    def batch_size(self, unfinished: int) -> int:
        """The next power of two, so that few sizes are captured."""
        return 1 << (unfinished - 1).bit_length() if unfinished else 0

    def keep(self, rows: Int[Tensor, "rows"]) -> None:
        """Drop all other rows; the next step is captured again."""
        super().keep(rows)
        self.token, self.positions, self.run = self.token[rows], self.positions[rows], None


def captured(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Capture `step` as a CUDA graph and return a function that replays it; return `step` itself if that fails."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        # Autocast caches casted weights. Casts made during the capture would be freed with its memory.
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        with torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False):
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = step()
    except Exception as error:  # which exception it is depends on the model
        log.warning(
            "no CUDA graph of the decoding step (%s): decoding runs without; see generation.cuda_graphs=never", error
        )
        return step

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
