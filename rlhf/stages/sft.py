"""Supervised fine-tuning: maximum likelihood of demonstrations."""

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.records import Demonstration
from rlhf.distributed import collectives as parallel
from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences, pack
from rlhf.models.tokenizing import encode, encode_texts, last_tokens, spelt
from rlhf.settings import SFTSettings
from rlhf.stages.base import Stage

log = logging.getLogger(__name__)


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    responses: Sequence[str],
    max_length: int,
    ended: Sequence[bool] | None = None,
) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, response ids) a row, encoded apart as at generation, the response ending in EOS.

    A response that does not fit into `max_length` tokens is cut and gets no EOS: its end was not seen. No more has a
    sampled one that has not `ended` by itself. A prompt that leaves no room keeps its BOS, its last tokens and one of
    the response. How many are cut is logged, and how many spell a special token, which is read as text.
    """
    rows, cut = [], 0
    whole = [True] * len(responses) if ended is None else ended
    for prompt, answer, end in zip(encode(tokenizer, prompts), encode_texts(tokenizer, responses), whole, strict=True):
        if len(prompt) >= max_length:
            prompt = last_tokens(tokenizer, prompt, max_length - 1)
        wanted = [*answer, tokenizer.eos_token_id] if end else answer
        rows.append((prompt, wanted[: max_length - len(prompt)]))
        cut += len(prompt) + len(wanted) > max_length
    if cut:
        log.warning("%d of %d texts are longer than max_length=%d tokens and cut", cut, len(rows), max_length)
    found = spelt(tokenizer, prompts) + spelt(tokenizer, responses)
    if found:
        log.warning("%d of %d prompts and responses contain the name of a special token, which is read as text",
                    found, 2 * len(rows))  # fmt: skip
    return rows


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
        self.note_refusal(result, step, batch)
        if step % self.settings.log_every == 0 or step == self.total_steps:
            loss = result.sums["loss"] / result.over
            self.emit({"sft/loss": loss, "sft/grad_norm": result.grad_norm, "sft/lr": lr}, step, bar=["sft/loss"])

    def on_validation_epoch_start(self) -> None:
        """Begin a measurement."""
        self._held_out = []

    def validation_step(self, batch: Sequences, index: int) -> None:
        """Measure a batch of held-out demonstrations, the processes taking turns."""
        if index % parallel.size() != parallel.rank():
            return
        for rows in self.microbatches(batch):
            part = batch.rows(rows)
            self._held_out.append((self.loss_sum(part), part.targets_predicted.sum()))

    def on_validation_epoch_end(self) -> None:
        """Perplexity over all held-out targets."""
        device = self.roles.device
        loss = float(parallel.total(sum((part for part, _ in self._held_out), torch.zeros((), device=device))))
        count = int(parallel.total(sum((count for _, count in self._held_out), torch.zeros((), device=device))))
        metrics = {"sft/validation_loss": loss / count, "sft/perplexity": math.exp(min(loss / count, 700))}
        self.emit(metrics, self.steps_done, bar=["sft/perplexity"])
