"""Supervised fine-tuning: maximum likelihood of demonstrations."""

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.records import Demonstration
from rlhf.distributed import collectives
from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences, pack
from rlhf.models.tokenizing import encode_pairs
from rlhf.settings import SFTSettings
from rlhf.stages.base import Stage

log = logging.getLogger(__name__)


class SupervisedFineTuning(Stage):
    """Cross-entropy of the response (or of the whole text) given the prompt.

    `roles` needs a role `policy`; what of it requires a gradient is trained. Logs `sft/loss` (nats per token) and
    `sft/perplexity` on held-out demonstrations.
    """

    def __init__(self, settings: SFTSettings, roles: Roles, tokenizer: PreTrainedTokenizerBase, total_steps: int):
        super().__init__(settings, total_steps)
        self.sft, self.roles, self.tokenizer = settings, roles, tokenizer
        self._held_out: list[tuple[Tensor, Tensor]] = []

    def encode(self, rows: Sequence[Demonstration]) -> list[tuple[list[int], list[int]]]:
        """Token ids of demonstrations."""
        prompts, responses = [row.prompt for row in rows], [row.response for row in rows]
        return encode_pairs(self.tokenizer, prompts, responses, self.sft.max_length)

    def collate(self, rows: list[tuple[list[int], list[int]]]) -> Sequences:
        """A batch, packed when so configured."""
        batch = Sequences.from_lists(
            [prompt for prompt, _ in rows], [response for _, response in rows], self.sft.loss_on == "text"
        )
        return pack(batch, self.sft.max_length) if self.sft.packing else batch

    def loss_sum(self, batch: Sequences) -> Tensor:
        """Negative log-likelihood summed over the targets, in nats."""
        states = self.roles.states("policy", batch, batch.predicting)
        return -self.roles.token_stats("policy", states, batch.target_ids).logprobs.sum()

    def training_step(self, batch: Sequences, index: int) -> None:
        """One optimiser step."""
        self.roles.train()
        count = batch.targets_predicted.sum()
        lr = self.current_lr
        result = self.accumulate(self.microbatches(batch), lambda rows: (self.loss_sum(batch.rows(rows)), {}), count)
        self.advance_schedule()
        step = self.trainer.global_step
        self.note_skipped(result, step, batch)
        if step % self.settings.log_every == 0 or step == self.total_steps:
            loss = result.sums["loss"] / result.count
            self.emit({"sft/loss": loss, "sft/grad_norm": result.grad_norm, "sft/lr": lr}, step, bar=["sft/loss"])

    def on_validation_epoch_start(self) -> None:
        """Begin a measurement."""
        self._held_out = []

    def validation_step(self, batch: Sequences, index: int) -> None:
        """Measure a batch of held-out demonstrations, the processes taking turns."""
        if index % collectives.size() != collectives.rank():
            return
        for rows in self.microbatches(batch):
            part = batch.rows(rows)
            self._held_out.append((self.loss_sum(part), part.targets_predicted.sum()))

    def on_validation_epoch_end(self) -> None:
        """Perplexity over all held-out targets."""
        device = self.roles.device
        loss = float(
            collectives.all_reduce_sum(sum((part for part, _ in self._held_out), torch.zeros((), device=device)))
        )
        count = int(
            collectives.all_reduce_sum(sum((count for _, count in self._held_out), torch.zeros((), device=device)))
        )
        metrics = {"sft/validation_loss": loss / count, "sft/perplexity": math.exp(min(loss / count, 700))}
        self.emit(metrics, self.steps_done, bar=["sft/perplexity"])
