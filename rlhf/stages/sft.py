"""Supervised fine-tuning: maximum likelihood of demonstrations."""

import math
import sys
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.records import Demonstration
from rlhf.distributed import collectives
from rlhf.models.chat_turns import AssistantTurns
from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences, pack
from rlhf.models.tokenizing import encode_pairs
from rlhf.settings import JOINED, SFTSettings
from rlhf.stages.cutting import Encoded
from rlhf.stages.joining import joined
from rlhf.stages.supervised import SupervisedStage


class SupervisedFineTuning(SupervisedStage):
    """Cross-entropy of the response given the prompt, in nats per token.

    With `sft.loss_on=assistant`, the assistant's earlier turns in the prompt are learnt too, and with `text` all of it.
    `roles` needs a role `policy`. On held-out demonstrations it logs `sft/validation_loss` and `sft/perplexity`.
    """

    prefix = "sft"

    def __init__(self, settings: SFTSettings, roles: Roles, tokenizer: PreTrainedTokenizerBase, total_steps: int):
        super().__init__(settings, roles, tokenizer, total_steps)
        self.sft, self.lr_ratio = settings, settings.lora.lr_ratio
        self.turns = AssistantTurns(tokenizer) if settings.loss_on == "assistant" else None
        self._held_out: list[tuple[Tensor, int]] = []

    def encode(self, rows: Sequence[Demonstration], whole: bool = False) -> list[Encoded]:
        """(prompt ids, response ids) of each demonstration, cut to `sft.max_length` tokens unless `whole`."""
        prompts, responses = [row.prompt for row in rows], [row.response for row in rows]
        return encode_pairs(self.tokenizer, prompts, responses, sys.maxsize if whole else self.sft.max_length)

    def training_rows(self, rows: Sequence[Demonstration]) -> list[Encoded]:
        """What is trained on: the encoded demonstrations, or with `sft.packing=joined` sequences cut from them."""
        if self.sft.packing != JOINED:
            return self.encode(rows)
        return joined(self.encode(rows, whole=True), self.sft.max_length, self.sft.seed)

    def collate(self, rows: list[Encoded]) -> Sequences:
        """A batch; with `sft.packing=true`, several texts share a row and are kept apart."""
        prompts, responses = [prompt for prompt, _ in rows], [response for _, response in rows]
        batch = Sequences.from_lists(prompts, responses, self.sft.loss_on == "text")
        if self.turns is not None:
            for targets, prompt in zip(batch.targets, prompts, strict=True):
                targets[: len(prompt)] = torch.tensor(self.turns(prompt))
        return pack(batch, self.sft.max_length) if self.sft.packing is True else batch

    def count(self, batch: Sequences) -> int:
        """The number of target tokens."""
        return int(batch.targets_predicted.sum())

    def loss(self, batch: Sequences) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Negative log-likelihood summed over the target tokens, in nats."""
        states = self.roles.states("policy", batch, batch.predicting)
        return -self.roles.token_stats("policy", states, batch.target_ids).logprobs.sum(), {}

    def on_validation_epoch_start(self) -> None:
        """Begin a measurement on the held-out demonstrations."""
        self._held_out = []

    def validation_step(self, batch: Sequences, index: int) -> None:
        """Measure a batch of held-out demonstrations."""
        for rows in self.microbatches(batch) if self.has_turn(index) else []:
            part = batch.rows(rows)
            self._held_out.append((self.loss(part)[0], self.count(part)))

    def on_validation_epoch_end(self) -> None:
        """Log loss and perplexity over all held-out target tokens."""
        zero = torch.zeros((), device=self.roles.device)
        loss = float(collectives.all_reduce_sum(sum((part for part, _ in self._held_out), zero)))
        count = int(collectives.all_reduce_sum(zero + sum(count for _, count in self._held_out)))
        metrics = {"sft/validation_loss": loss / count, "sft/perplexity": math.exp(min(loss / count, 700))}
        self.emit(metrics, self.steps_done, bar=["sft/perplexity"])
