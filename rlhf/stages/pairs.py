"""Pairs of texts: encoded, laid out as a batch that holds every text once, and split into passes that read it once."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.records import Comparison
from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences
from rlhf.models.tokenizing import encode_pairs
from rlhf.stages.cutting import Encoded

Pair = tuple[Encoded, Encoded]  # chosen and rejected


class Group(NamedTuple):
    """The different comparisons of a prompt, and how many annotators made each of them."""

    pairs: list[Pair]
    votes: list[int]


def encode_comparisons(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Comparison], max_length: int) -> list[Pair]:
    """(chosen, rejected) of each comparison, both as (prompt ids, response ids), cut to `max_length` tokens."""
    different = {id(row): row for row in rows}  # one with several votes is there as often
    sides = [
        [(row.prompt, getattr(row, side), getattr(row, f"{side}_ended", None)) for row in different.values()]
        for side in ("chosen", "rejected")
    ]
    texts = list(dict.fromkeys(itertools.chain(*sides)))  # each text once, however many comparisons it is in
    prompts, responses, ended = map(list, zip(*texts, strict=True))
    ids = dict(zip(texts, encode_pairs(tokenizer, prompts, responses, max_length, ended), strict=True))
    pairs = [(ids[chosen], ids[rejected]) for chosen, rejected in zip(*sides, strict=True)]
    by_row = dict(zip(different, pairs, strict=True))
    return [by_row[id(row)] for row in rows]


def grouped(pairs: Sequence[Pair]) -> list[Group]:
    """Consecutive pairs with the same prompt as one group."""
    groups = []
    for _, of_prompt in itertools.groupby(pairs, key=lambda pair: pair[0][0]):
        members = [((id(chosen), id(rejected)), (chosen, rejected)) for chosen, rejected in of_prompt]
        votes = Counter(key for key, _ in members)  # equal texts are one object (`encode_comparisons`)
        different = dict(members)
        groups.append(Group(list(different.values()), [votes[key] for key in different]))
    return groups


@dataclass
class Comparisons:
    """A batch of comparisons, which holds every text once, however many comparisons it is in.

    `sides` are the rows of `texts` with the chosen and the rejected text of each comparison, and `votes` says how many
    annotators made it, that is how often it counts. All tensors are on the CPU.
    """

    texts: Sequences
    sides: Int[Tensor, "pairs 2"]
    votes: Float[Tensor, "pairs"]

    @classmethod
    def of(cls, rows: Sequence[Pair | Group]) -> "Comparisons":
        """A batch of single comparisons or of groups of them, its longest texts first.

        Attention on a CPU reads adjacent texts of equal length at once (`rlhf.models.isolated_attention`).
        """
        groups = [row if isinstance(row, Group) else Group([row], [1]) for row in rows]
        both = [
            (tuple(prompt), tuple(response)) for group in groups for pair in group.pairs for prompt, response in pair
        ]
        texts = sorted(dict.fromkeys(both), key=lambda text: -len(text[0]) - len(text[1]))
        places = {text: place for place, text in enumerate(texts)}
        votes = [float(count) for group in groups for count in group.votes]
        sides = torch.tensor([places[text] for text in both]).view(-1, 2)
        prompts, responses = zip(*texts, strict=True)
        return cls(Sequences.from_lists(prompts, responses), sides, torch.tensor(votes))

    def __len__(self) -> int:
        return len(self.sides)

    def rows(self, index: Int[Tensor, "rows"]) -> "Comparisons":
        """A batch of these comparisons, with the texts that occur in them."""
        places, sides = self.sides[index].unique(return_inverse=True)
        return Comparisons(self.texts.rows(places), sides, self.votes[index])

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that define the comparisons, by name, to be saved."""
        return {**self.texts.tensors(), "sides": self.sides, "votes": self.votes}

    def passes(self, roles: Roles, budget: int, group_prompts: bool = False) -> list[Tensor]:
        """The numbers of the comparisons of each pass, whose different texts have at most `budget` tokens together.

        With `group_prompts`, consecutive comparisons with the same prompt stay together, as they share texts.
        """
        sides, lengths = self.sides.tolist(), self.texts.lengths.tolist()
        groups = [[pair] for pair in range(len(self))]
        if group_prompts:
            ids, ends = self.texts.ids.tolist(), self.texts.prompt_lengths.tolist()
            prompts = [ids[chosen][: ends[chosen]] for chosen, _ in sides]
            groups = [list(group) for _, group in itertools.groupby(range(len(self)), key=lambda pair: prompts[pair])]
        read = [{row for pair in group for row in sides[pair]} for group in groups]
        sizes = [len(rows) * max(lengths[row] for row in rows) for rows in read]
        return [
            torch.tensor([pair for group in part for pair in groups[group]]) for part in roles.groups(sizes, budget)
        ]
