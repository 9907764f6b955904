"""A batch of token sequences, each a prompt and a response, padded on the right only.

Under causal attention a token never sees what stands to its right, so right padding needs no attention mask and changes
nothing. What is padding is known from lengths, never from a token's id: a tokenizer whose pad token is its EOS is safe.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

PER_GROUP = 16  # a pass over a few rows takes as long as one over this share of the budget


@dataclass
class Sequences:
    """`ids` holds prompt, response, padding; lengths are in tokens (`lengths` counts prompt and response).

    `position_ids` is only there when several sequences are packed in a row (see `pack`) and restarts at each of them.
    `targets` marks the tokens to be predicted: the response, or all when the loss is on the whole text.
    """

    ids: Int[Tensor, "batch time"]
    prompt_lengths: Int[Tensor, "batch"]
    lengths: Int[Tensor, "batch"]
    targets: Bool[Tensor, "batch time"]
    position_ids: Int[Tensor, "batch time"] | None = None

    @classmethod
    def from_lists(
        cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], whole_text: bool = False
    ) -> "Sequences":
        """Pad lists of ids to the longest; `whole_text` makes the prompt (but its first token) a target as well."""
        prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
        lengths = prompt_lengths + torch.tensor([len(response) for response in responses])
        ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
        for row, prompt, response in zip(ids, prompts, responses, strict=True):
            text = [*prompt, *response]
            row[: len(text)] = torch.tensor(text)
        return cls(ids, prompt_lengths, lengths, spans(prompt_lengths * (not whole_text), lengths, ids.shape[1]))

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> "Sequences":
        """The same batch on `device`."""
        positions = None if self.position_ids is None else self.position_ids.to(device)
        return Sequences(
            self.ids.to(device),
            self.prompt_lengths.to(device),
            self.lengths.to(device),
            self.targets.to(device),
            positions,
        )

    def rows(self, index: Int[Tensor, "rows"]) -> "Sequences":
        """Some rows, cut to the longest of them."""
        time = int(self.lengths[index].max())
        positions = None if self.position_ids is None else self.position_ids[index, :time]
        return Sequences(
            self.ids[index, :time],
            self.prompt_lengths[index],
            self.lengths[index],
            self.targets[index, :time],
            positions,
        )

    def tensors(self) -> dict[str, Tensor]:
        """What is needed to read the texts again, by name."""
        return {"ids": self.ids, "prompt_lengths": self.prompt_lengths, "lengths": self.lengths}

    def responses(self) -> list[list[int]]:
        """The response ids, row by row."""
        bounds = zip(self.prompt_lengths.tolist(), self.lengths.tolist(), strict=True)
        return [row[start:end] for row, (start, end) in zip(self.ids.tolist(), bounds, strict=True)]

    @property
    def ragged(self) -> bool:
        """Whether a pass over whole rows would be one over padding, or over several sequences in a row."""
        return self.position_ids is not None or int(self.lengths.min()) < self.ids.shape[1]

    @property
    def predicting(self) -> Bool[Tensor, "batch time"]:
        """The positions whose hidden state predicts a target: one to the left of each."""
        shifted = torch.zeros_like(self.targets)
        shifted[:, :-1] = self.targets[:, 1:]
        return shifted

    @property
    def target_ids(self) -> Int[Tensor, "tokens"]:
        """The targets of all rows, one after the other: aligned with `hidden[predicting]`."""
        return self.ids[self.targets_predicted]

    @property
    def targets_predicted(self) -> Bool[Tensor, "batch time"]:
        """`targets` without a row's first token, which nothing predicts."""
        mask = self.targets.clone()
        mask[:, 0] = False
        return mask

    @property
    def response_mask(self) -> Bool[Tensor, "batch response"]:
        """Marks each row's response tokens in a tensor that starts at the first of them."""
        lengths = self.lengths - self.prompt_lengths
        return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


def spans(starts: Int[Tensor, "batch"], ends: Int[Tensor, "batch"], time: int) -> Bool[Tensor, "batch {time}"]:
    """True from each row's start up to its end."""
    position = torch.arange(time, device=starts.device)
    return (position >= starts[:, None]) & (position < ends[:, None])


def unflatten(flat: Float[Tensor, "tokens"], mask: Bool[Tensor, "batch response"]) -> Float[Tensor, "batch response"]:
    """Lay values of all response tokens, one after the other, out by row; 0 where the mask is false."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


def length_buckets(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Rows grouped by similar length, so that a group padded to its longest row has at most `budget` tokens.

    The groups are those of least padding, where a group itself costs as much as `budget / PER_GROUP` tokens. A row
    longer than the budget is a group of its own. The order of the groups depends on the lengths alone.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    cost, starts = [0.0], [0]  # of the first i rows: the least, and where their last group starts
    for end in range(1, len(order) + 1):
        choices: list[tuple[float, int]] = []
        for start in range(end - 1, -1, -1):
            tokens = lengths[order[start]] * (end - start)
            if tokens > budget and choices:
                break
            choices.append((cost[start] + tokens + budget / PER_GROUP, start))
        least, start = min(choices)
        cost.append(least)
        starts.append(start)
    groups, end = [], len(order)
    while end:
        groups.append(order[starts[end] : end])
        end = starts[end]
    yield from reversed(groups)


def filled(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Rows in their order, cut into groups of at most `budget` tokens; a longer row is a group of its own."""
    group: list[int] = []
    room = budget
    for row, length in enumerate(lengths):
        if group and length > room:
            yield group
            group, room = [], budget
        group.append(row)
        room -= length
    if group:
        yield group


def pack(batch: Sequences, width: int) -> Sequences:
    """Several sequences in a row of at most `width` tokens, isolated by restarting positions (first fit, decreasing).

    The models tell the sequences apart by the restarts alone; that needs `attention_mask=None` and no cache, which is
    how `Roles.hidden` calls them. A packed row counts as one long response in `lengths`.
    """
    lengths: list[int] = batch.lengths.tolist()
    width = max(width, *lengths)
    bins: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        place = next((i for i, left in enumerate(room) if left >= lengths[row]), None)
        if place is None:
            place = len(bins)
            bins.append([])
            room.append(width)
        bins[place].append(row)
        room[place] -= lengths[row]
    used = torch.tensor([width - left for left in room])
    time = int(used.max())
    ids = torch.zeros(len(bins), time, dtype=torch.long)
    positions = torch.zeros(len(bins), time, dtype=torch.long)
    targets = torch.zeros(len(bins), time, dtype=torch.bool)
    for packed, rows in enumerate(bins):
        at = 0
        for row in rows:
            span = slice(at, at + lengths[row])
            ids[packed, span] = batch.ids[row, : lengths[row]]
            positions[packed, span] = torch.arange(lengths[row])
            targets[packed, span] = batch.targets[row, : lengths[row]]
            targets[packed, at] = False
            at += lengths[row]
        # padding goes on counting: a position that repeated 0 would start a "sequence" per padding token
        positions[packed, at:] = torch.arange(time - at)
    return Sequences(ids, torch.zeros_like(used), used, targets, positions)


def concatenate(parts: Sequence[Shaped[Tensor, "_ ..."]], order: Sequence[int]) -> Tensor:
    """Undo a grouping: parts[k] holds the rows `order[...]` in turn; the result has them in their first order."""
    joined = torch.cat(list(parts))
    result = torch.empty_like(joined)
    result[torch.as_tensor(order, device=joined.device)] = joined
    return result
