"""Batches of token sequences, each a prompt and a response, padded on the right; and how rows are grouped for passes.

With causal attention, a token never attends to tokens on its right: padding there needs no attention mask and changes
nothing. Padding is known from lengths, never from token ids, so the pad token of a tokenizer may be its EOS.

A batch stays in host memory. Which tokens go through a model and which states are read is worked out there, and only
the result is sent to the device (`send`): nothing waits for a GPU to say how long a sequence is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

FROZEN_FACTOR = 8  # on a GPU, which waits for launches if a pass has few tokens
PER_GROUP = 16  # each forward pass has a fixed cost, about that of `budget / PER_GROUP` tokens


@dataclass
class Sequences:
    """Each row of `ids` is prompt, response, padding. `lengths` counts the tokens of prompt and response together.

    `targets` marks the tokens that the loss is on: the response, or the whole text. `position_ids` are only set if
    several sequences are packed into a row (see `pack`), and restart at 0 with each of them. All tensors are on the
    CPU.
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
        """Pad lists of token ids to the longest; with `whole_text`, prompts are targets too."""
        prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
        lengths = prompt_lengths + torch.tensor([len(response) for response in responses])
        ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
        for row, prompt, response in zip(ids, prompts, responses, strict=True):
            text = [*prompt, *response]
            row[: len(text)] = torch.tensor(text)
        return cls(ids, prompt_lengths, lengths, spans(prompt_lengths * (not whole_text), lengths, ids.shape[1]))

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, index: Int[Tensor, "rows"] | Sequence[int]) -> "Sequences":
        """A batch of these rows, cut to the longest of them."""
        index = torch.as_tensor(index)
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
        """The tensors that define the texts, by name, to be saved."""
        return {"ids": self.ids, "prompt_lengths": self.prompt_lengths, "lengths": self.lengths}

    def responses(self) -> list[list[int]]:
        """The response ids of each row."""
        bounds = zip(self.prompt_lengths.tolist(), self.lengths.tolist(), strict=True)
        return [row[start:end] for row, (start, end) in zip(self.ids.tolist(), bounds, strict=True)]

    @property
    def predicting(self) -> Bool[Tensor, "batch time"]:
        """Marks the positions whose hidden states predict a target: one to the left of each target."""
        shifted = torch.zeros_like(self.targets)
        shifted[:, :-1] = self.targets[:, 1:]
        return shifted

    @property
    def target_ids(self) -> Int[Tensor, "tokens"]:
        """The target ids of all rows, concatenated, in the order of `hidden[predicting]`."""
        return self.ids[self.targets_predicted]

    @property
    def targets_predicted(self) -> Bool[Tensor, "batch time"]:
        """`targets` without the first token of each row, which no hidden state predicts."""
        mask = self.targets.clone()
        mask[:, 0] = False
        return mask

    @property
    def response_mask(self) -> Bool[Tensor, "batch response"]:
        """Marks the response tokens of each row, in tensors whose rows begin with the first response token."""
        lengths = self.response_lengths
        return torch.arange(int(lengths.max())) < lengths[:, None]

    @property
    def response_lengths(self) -> Int[Tensor, "batch"]:
        """The number of response tokens of each row."""
        return self.lengths - self.prompt_lengths

    def response_places(self, rows: Int[Tensor, "rows"] | Sequence[int]) -> Int[Tensor, "tokens"]:
        """Where the response tokens of these rows lie in a flattened tensor [batch, response], row after row."""
        rows, lengths = torch.as_tensor(rows), self.response_lengths
        column, width = torch.arange(int(lengths[rows].max())), int(lengths.max())
        return (rows[:, None] * width + column)[column < lengths[rows][:, None]]


def send(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to the device, without waiting for the device."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def spans(starts: Int[Tensor, "batch"], ends: Int[Tensor, "batch"], time: int) -> Bool[Tensor, "batch {time}"]:
    """A mask that is true from each row's start up to, but not including, its end."""
    position = torch.arange(time, device=starts.device)
    return (position >= starts[:, None]) & (position < ends[:, None])


def marked(mask: Bool[Tensor, "*places"], device: torch.device) -> Int[Tensor, "marked"]:
    """Where a mask on the host is true, in its flattened form, on the device."""
    return send(mask.flatten().nonzero().squeeze(1), device)


def select(x: Shaped[Tensor, "*places_and_rest"], mask: Bool[Tensor, "*places"]) -> Shaped[Tensor, "marked *rest"]:
    """`x[mask]` for a mask on the host over the first dimensions: the device need not count its entries first."""
    return x.flatten(0, mask.dim() - 1).index_select(0, marked(mask, x.device))


def unflatten(flat: Float[Tensor, "tokens"], mask: Bool[Tensor, "batch response"]) -> Float[Tensor, "batch response"]:
    """Put the concatenated values of all marked tokens into rows; 0 where the mask, on the host, is false."""
    return flat.new_zeros(mask.numel()).index_copy(0, marked(mask, flat.device), flat).view(mask.shape)


def frozen_tokens(budget: int, on_gpu: bool) -> int:
    """The tokens of a pass without activations to keep, where one that keeps them may have `budget` tokens."""
    return budget * (FROZEN_FACTOR if on_gpu else 1)


def length_buckets(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Group rows of similar length, so that a group padded to its longest row has at most `budget` tokens.

    Minimises the total cost by dynamic programming, where a group costs its tokens including padding, plus
    `budget / PER_GROUP`. A row longer than the budget is a group of its own. The result depends on the lengths alone.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    # For the first i rows of `order`: the least cost of grouping them, and where the last of those groups starts.
    cost, starts = [0.0], [0]
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
    # Follow the starts back from the last row.
    groups, end = [], len(order)
    while end:
        groups.append(order[starts[end] : end])
        end = starts[end]
    yield from reversed(groups)


def filled(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Group rows in their given order, up to `budget` tokens without padding; a longer row is a group of its own."""
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
    """Pack sequences into rows of at most `width` tokens, or of the longest sequence if that is longer.

    Models in transformers tell packed sequences apart by positions that restart at 0. That requires `attention_mask`
    to be None and no cache, as in `Roles.hidden`. A packed row counts as one long response.
    """
    # 1. Assign sequences to rows: the longest first, each to the first row with room (first-fit decreasing).
    lengths: list[int] = batch.lengths.tolist()
    width = max(width, *lengths)
    bins: list[list[int]] = []  # the sequences in each packed row
    room: list[int] = []  # the tokens that still fit into it
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        place = next((i for i, left in enumerate(room) if left >= lengths[row]), None)
        if place is None:
            place = len(bins)
            bins.append([])
            room.append(width)
        bins[place].append(row)
        room[place] -= lengths[row]

    # 2. Copy them there.
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
            targets[packed, at] = False  # the hidden state to its left belongs to another sequence
            at += lengths[row]
        # Number the padding 0, 1, …: with zeros, each padding token would be a sequence of its own.
        positions[packed, at:] = torch.arange(time - at)
    return Sequences(ids, torch.zeros_like(used), used, targets, positions)


def concatenate(parts: Sequence[Shaped[Tensor, "_ ..."]], order: Sequence[int]) -> Tensor:
    """Undo a grouping of rows: row i of the joined parts becomes row `order[i]` of the result."""
    joined = torch.cat(list(parts))
    return torch.empty_like(joined).index_copy(0, send(torch.as_tensor(order), joined.device), joined)
