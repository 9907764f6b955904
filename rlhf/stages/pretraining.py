"""PPO-ptx: part of the pretraining or supervised data is mixed into the updates (Ouyang et al. 2022, section 3.5)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from rlhf.distributed import collectives
from rlhf.models.sequences import Sequences
from rlhf.stages.base import Term
from rlhf.stages.batches import SeededBatches
from rlhf.stages.cutting import Encoded
from rlhf.stages.passes import UpdatePasses

FIRST_NUMBER = 10**6  # of the dropout masks of these micro-batches; those of rollouts count from 0


@dataclass(frozen=True)
class MixedPart:
    """A micro-batch of texts in an optimiser step.

    `number` counts micro-batches, for their dropout masks. `weight` is what the sum of its loss has to be multiplied by
    to be its share of a mean over the texts, once the step has divided all losses by its response tokens.
    """

    passes: UpdatePasses
    texts: Sequences
    number: int
    weight: float
    coef: float

    def terms(self, step: int) -> Iterator[Term]:
        """The weighted loss; reported is the negative log-likelihood without the coefficient."""
        states = self.passes.states("policy", self.texts, self.number, step)
        logprobs = self.passes.roles.token_stats("policy", states, self.texts.target_ids).logprobs
        loss = -logprobs.sum() * self.weight
        yield self.coef * loss, {"ptx_loss": loss}


class PretrainingMix:
    """Adds γ times the mean negative log-likelihood of texts, in nats per token, to the loss of each optimiser step.

    Each optimiser step has texts of its own, which are a function of (seed, step): epochs over the texts in random
    order. They are read at temperature 1, in micro-batches of their own, each back-propagated by itself.

    Args:
        rows: (prompt ids, response ids) of each text; the loss is on the responses.
        coef: γ.
        batch_size: texts per optimiser step, over all processes.
        budget: tokens per micro-batch.
        seed: of the order of the texts.
        updates: optimiser steps per rollout batch.
    """

    def __init__(self, rows: Sequence[Encoded], coef: float, batch_size: int, budget: int, seed: int, updates: int):
        self.rows, self.coef, self.budget, self.updates = rows, coef, budget, updates
        self.order = SeededBatches(len(rows), batch_size, seed, 0)

    def parts(self, passes: UpdatePasses, step: int, update: int, count: int) -> list[MixedPart]:
        """The micro-batches of this process for an optimiser step, numbered `update` within rollout batch `step`.

        `count` is the number of response tokens of this process's rollouts, by whose sum the step divides its losses.
        """
        drawn = [self.rows[row] for row in self.order.batch((step - 1) * self.updates + update)]
        own = drawn[collectives.rank() :: collectives.size()]
        total = collectives.all_reduce_sum(torch.tensor(float(count), device=passes.roles.device))
        # no state predicts the first token of a text without prompt
        weight = float(total) / sum(len(response) - (not prompt) for prompt, response in drawn)
        if not own:
            return []
        batch = Sequences.from_lists([prompt for prompt, _ in own], [response for _, response in own])
        groups = passes.roles.groups(batch.lengths.tolist(), self.budget)
        first = FIRST_NUMBER + update * len(self.rows)
        return [
            MixedPart(passes, batch.rows(group), first + number, weight, self.coef)
            for number, group in enumerate(groups)
        ]
