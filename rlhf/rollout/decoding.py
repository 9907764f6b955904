"""One decoding step on a key/value cache: over what is there so far, or at fixed shapes, as a CUDA graph wants it."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.rollout.kv_cache import BufferCache, cache_argument

log = logging.getLogger(__name__)
WARM_UP = 2  # steps before a capture: libraries set themselves up in their first


class GrowingStep:
    """Attends over the tokens there are so far; rows that are done are dropped as they come.

    `visible` [batch, 1, 1, capacity] says which places of the cache a row sees; as [batch, capacity] it says which of
    them hold a token, and the model sees to its windows and distances itself.
    """

    def __init__(self, model: PreTrainedModel, cache: BufferCache, visible: Bool[Tensor, "batch *one_one capacity"]):
        self.model, self.cache, self.visible = model, cache, visible
        self.argument = cache_argument(model.base_model)

    def __call__(
        self, token: Int[Tensor, "batch"], positions: Int[Tensor, "batch"], place: int
    ) -> Float[Tensor, "batch hidden"]:
        """The hidden states after each row's `token`, which is put at `place` of the cache."""
        mask = self.visible[..., : place + 1]
        return _forward(self.model, token[:, None], positions[:, None], mask, self.argument, self.cache)

    def remaining(self, done: Bool[Tensor, "batch"]) -> Int[Tensor, "rows"]:
        """The rows worth going on with, filled up with others to a batch of `size`; none once all are done."""
        return done.argsort(stable=True)[: self.size(int((~done).sum()))]

    def size(self, left: int) -> int:
        """How large a batch to go on with when `left` rows are not done."""
        return left

    def keep(self, rows: Int[Tensor, "rows"]) -> None:
        """Drop all rows but these."""
        self.cache.keep(rows)
        self.visible = self.visible[rows]


class CompiledStep(GrowingStep):
    """As `GrowingStep`, compiled as a whole, once for any number of rows and any place. Only for sdpa attention.

    `compiled` are the options of torch.compile.
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
        end = place + 1
        buffers = [(layer.keys[:, :, :end], layer.values[:, :, :end]) for layer in self.cache.layers]
        where = token.new_tensor([place])
        visible = self.visible[..., :end]
        return self.run(self.model, token[:, None], positions[:, None], visible, self.argument, buffers, where)

    def size(self, left: int) -> int:
        """Not one row, which would be compiled anew."""
        return 2 if left == 1 else left


def _step(
    model: PreTrainedModel,
    token: Tensor,
    positions: Tensor,
    visible: Tensor,
    argument: str,
    buffers: list[tuple[Tensor, Tensor]],
    place: Tensor,
) -> Tensor:
    """A function of tensors, in which the compiler finds no number that changes from step to step."""
    return _forward(model, token, positions, visible, argument, BufferCache.of(buffers, place))


def _forward(
    model: PreTrainedModel, token: Tensor, positions: Tensor, mask: Tensor, argument: str, cache: BufferCache
) -> Tensor:
    """Hidden states [rows, hidden] after a token [rows, 1] of each row; `argument` is `cache_argument`."""
    return model.base_model(
        input_ids=token, attention_mask=mask, position_ids=positions, use_cache=True, **{argument: cache}
    ).last_hidden_state[:, -1]


def prefill(
    model: PreTrainedModel,
    prompts: Int[Tensor, "batch width"],
    cache: BufferCache,
    held: Bool[Tensor, "batch width"] | None = None,
) -> Float[Tensor, "batch width hidden"]:
    """Hidden states of prompts, whose keys and values go into the cache.

    `held` marks the tokens of prompts that are padded on the left; on the right no mask is needed.
    """
    options: dict[str, Any] = {cache_argument(model.base_model): cache}
    if held is not None:
        options |= {"attention_mask": held.long(), "position_ids": (held.long().cumsum(1) - 1).clamp(min=0)}
    return model.base_model(input_ids=prompts, use_cache=True, **options).last_hidden_state


class FixedStep(GrowingStep):
    """Attends over the whole capacity under a mask: every step has the same shapes and the same addresses.

    So it can be captured once as a CUDA graph and replayed (`capture`), which spares the launch of each kernel. The
    batch shrinks by halves, to powers of two, and is captured anew then. A graph holds the addresses of the weights
    too: it is no longer of use once the adapter merged into them is taken out. NOT MEASURED, for want of a GPU; the
    steps themselves are tested on the CPU. Only for sdpa attention.
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
        """As `GrowingStep`; with a graph, what it returns is overwritten by the next step."""
        self.token.copy_(token[:, None])
        self.positions.copy_(positions[:, None])
        self.place.fill_(place)
        if self.run is None:
            self.run = captured(self.step) if self.capture else self.step
        return self.run()

    def step(self) -> Float[Tensor, "batch hidden"]:
        """A function of the buffers alone; done twice it is the same."""
        self.visible.index_fill_(-1, self.place, True)
        return _forward(self.model, self.token, self.positions, self.visible, self.argument, self.cache)

    def size(self, left: int) -> int:
        """A power of two."""
        return 1 << (left - 1).bit_length() if left else 0

    def keep(self, rows: Int[Tensor, "rows"]) -> None:
        """Drop all rows but these, which are captured anew."""
        super().keep(rows)
        self.token, self.positions, self.run = self.token[rows], self.positions[rows], None


def captured(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`step` as a CUDA graph, or as it is where that cannot be captured."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        # casts that autocast remembers would be freed with the memory of the capture
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        with torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False):
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = step()
    except Exception as error:  # it depends on the model what goes wrong
        log.warning("no CUDA graph of the decoding step (%s): without; see generation.cuda_graphs=never", error)
        return step

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
