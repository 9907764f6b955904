"""The state of one request in the native engine: what has been sampled, and which rows are still being decoded."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from rlhf.models.sequences import send
from rlhf.rollout.engine import GenerationRequest


class DecodingBatch:
    """The prompts and responses of one request, and which rows are still being decoded.

    `active` [rows] are the indices of these rows, `finished` [rows] marks those among them that have already ended
    but were not dropped yet. All other tensors cover all rows of the request.
    """

    def __init__(self, request: GenerationRequest, stops: Sequence[int], pad_right: bool, device: torch.device):
        count, self.limit, self.temperature = len(request.prompts), request.max_new_tokens, request.temperature
        self.width, self.pad_right, self.device = max(map(len, request.prompts)), pad_right, device
        self._first, self._of_row = _distinct(request.prompts)
        prompts = torch.zeros(count, self.width, dtype=torch.long)
        for row, prompt in zip(prompts, request.prompts, strict=True):
            start = 0 if pad_right else self.width - len(prompt)
            row[start : start + len(prompt)] = torch.tensor(prompt)
        self.prompts = send(prompts, device)
        self.prompt_lengths = send(torch.tensor([len(prompt) for prompt in request.prompts]), device)
        self.stops = send(torch.tensor(stops), device)

        # All random numbers are drawn at once, so that a row's do not depend on which other rows are still active.
        source = request.generator
        draws = torch.rand(count, self.limit, generator=source, device=source.device)
        self.draws = send(draws, device) if source.device.type == "cpu" else draws.to(device)

        self.ids = torch.full((count, self.limit), stops[0], device=device)
        self.logprobs = torch.zeros(count, self.limit, device=device)
        self.values = torch.zeros(count, self.limit, device=device)
        self.lengths = torch.full((count,), self.limit, device=device)
        self.active = torch.arange(count, device=device)
        self.finished = torch.zeros(count, dtype=torch.bool, device=device)
        self._count = LateCount(count) if device.type == "cuda" else None

    def distinct_prompts(self) -> tuple[Int[Tensor, "distinct"], Int[Tensor, "rows"]]:
        """The first row of each distinct prompt, and for each row which of them is its own.

        All rows, unless prompts occur twice on average: to repeat what was read costs a copy of the cache.
        """
        return send(torch.tensor(self._first), self.device), send(torch.tensor(self._of_row), self.device)

    def append(self, step: int, token: Tensor, logprob: Tensor, value: Tensor | None) -> None:
        """Store what was sampled for the active rows; rows that sampled an EOS are finished."""
        self.ids[self.active, step] = token
        self.logprobs[self.active, step] = logprob
        if value is not None:
            self.values[self.active, step] = value
        newly_finished = (token[:, None] == self.stops).any(1) & ~self.finished
        self.lengths[self.active] = torch.where(newly_finished, step + 1, self.lengths[self.active])
        self.finished |= newly_finished

    def unfinished(self) -> int:
        """How many rows have not ended; on a GPU, as of the last call, so that the host does not wait for it."""
        count = (~self.finished).sum()
        return int(count) if self._count is None else self._count.exchange(count)

    def first(self, size: int) -> Int[Tensor, "size"]:
        """That many of the active rows, unfinished ones first."""
        return self.finished.argsort(stable=True)[:size]

    def keep(self, rows: Int[Tensor, "rows"]) -> None:
        """Keep only these of the active rows active."""
        self.active, self.finished = self.active[rows], self.finished[rows]


def _distinct(prompts: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    places: dict[tuple[int, ...], int] = {}
    of_row = [places.setdefault(tuple(prompt), len(places)) for prompt in prompts]
    if 2 * len(places) > len(prompts):
        return list(range(len(prompts))), list(range(len(prompts)))
    return [of_row.index(place) for place in range(len(places))], of_row


class LateCount:
    """A count on a GPU that the host reads one call late, when its copy has long arrived."""

    def __init__(self, first: int):
        self.host, self.arrived = torch.tensor(first), torch.cuda.Event()

    def exchange(self, count: Int[Tensor, ""]) -> int:
        """Start copying `count`, and return that of the last call (the first one of all on the first call)."""
        self.arrived.synchronize()  # returns at once before the first copy
        last = int(self.host)
        self.host = count.to("cpu", non_blocking=True)  # PyTorch copies into pinned memory then
        self.arrived.record()
        return last
