"""Pairs of texts: encoded, laid next to each other in a batch, and split into passes that read every text once."""

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.records import Comparison
from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences
from rlhf.models.tokenizing import encode_pairs
from rlhf.stages.cutting import Encoded

Pair = tuple[Encoded, Encoded]  # chosen and rejected


def encode_comparisons(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Comparison], max_length: int) -> list[Pair]:
    """(chosen, rejected) of each comparison, both as (prompt ids, response ids), cut to `max_length` tokens."""
    sides = [
        [(row.prompt, getattr(row, side), getattr(row, f"{side}_ended", None)) for row in rows]
        for side in ("chosen", "rejected")
    ]
    texts = list(dict.fromkeys(itertools.chain(*sides)))  # each text once, however many comparisons it is in
    prompts, responses, ended = map(list, zip(*texts, strict=True))
    ids = dict(zip(texts, encode_pairs(tokenizer, prompts, responses, max_length, ended), strict=True))
    return [(ids[chosen], ids[rejected]) for chosen, rejected in zip(*sides, strict=True)]


def side_by_side(pairs: Sequence[Pair]) -> Sequences:
    """A batch: row 2i is pair i's chosen text, and row 2i + 1 its rejected one."""
    texts = [text for pair in pairs for text in pair]
    return Sequences.from_lists([prompt for prompt, _ in texts], [response for _, response in texts])


def grouped(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Consecutive pairs with the same prompt as one group."""
    return [list(group) for _, group in itertools.groupby(pairs, key=lambda pair: pair[0][0])]


def distinct_texts(batch: Sequences) -> tuple[Int[Tensor, "texts"], Int[Tensor, "batch"]]:
    """The first row of each different text of a batch, and which of these texts each row is."""
    lengths = torch.stack([batch.prompt_lengths, batch.lengths], 1)
    texts, which = torch.cat([lengths, batch.ids], 1).unique(dim=0, return_inverse=True)
    first = torch.full((len(texts),), len(which)).scatter_reduce(0, which, torch.arange(len(which)), "amin")
    order = first.argsort()  # in the order of the batch
    return first[order], order.argsort()[which]


def _prompts(batch: Sequences) -> list[list[int]]:
    """The prompt ids of each row."""
    return [ids[:end] for ids, end in zip(batch.ids.tolist(), batch.prompt_lengths.tolist(), strict=True)]


def whole_pairs(batch: Sequences, roles: Roles, budget: int, group_prompts: bool = False) -> list[Tensor]:
    """The rows of `batch` in groups of whole pairs, of at most `budget` tokens, texts that are equal counting once.

    With `group_prompts`, consecutive pairs with the same prompt stay together, as they share texts.
    """
    which = distinct_texts(batch)[1]
    prompts = _prompts(batch)[::2] if group_prompts else list(range(len(batch) // 2))
    groups = [list(group) for _, group in itertools.groupby(range(len(batch) // 2), key=lambda pair: prompts[pair])]
    sizes = []
    for group in groups:
        rows = slice(2 * group[0], 2 * group[-1] + 2)
        sizes.append(len(which[rows].unique()) * int(batch.lengths[rows].max()))
    parts = roles.groups(sizes, budget)
    return [torch.tensor([2 * i + side for g in part for i in groups[g] for side in (0, 1)]) for part in parts]
