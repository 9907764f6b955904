"""Reward modelling: a scalar head on the supervised model, trained on pairwise preferences."""

import statistics
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.records import Comparison, Demonstration
from rlhf.distributed import collectives
from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences
from rlhf.models.tokenizing import encode_pairs
from rlhf.settings import RewardSettings
from rlhf.stages.base import Stage

Pair = tuple[tuple[list[int], list[int]], tuple[list[int], list[int]]]


def longer_accuracy(rows: Sequence[Comparison]) -> float:
    """Share of comparisons whose chosen answer has more characters, a tie counting ½: what length alone gets right."""
    lengths = [(len(row.chosen), len(row.rejected)) for row in rows]
    return statistics.fmean(0.5 if chosen == rejected else float(chosen > rejected) for chosen, rejected in lengths)


class RewardModeling(Stage):
    """−log σ(r(chosen) − r(rejected)), the score read at each text's last token (Stiennon et al. 2020, section 3.4).

    `roles` needs a role `reward` with a head. Logs `reward/loss` and, on held-out comparisons, `reward/accuracy` (a tie
    counts ½) and `reward/margin`. Chosen and rejected go through the model together, grouped by length.
    """

    def __init__(self, settings: RewardSettings, roles: Roles, tokenizer: PreTrainedTokenizerBase, total_steps: int):
        super().__init__(settings, total_steps)
        self.reward, self.roles, self.tokenizer = settings, roles, tokenizer
        self._margins: list[Tensor] = []

    def encode(self, rows: Sequence[Comparison]) -> list[Pair]:
        """Token ids of comparisons: (chosen, rejected), each (prompt, response)."""
        prompts, sides = [row.prompt for row in rows], []
        for side in ("chosen", "rejected"):
            texts, ended = [getattr(row, side) for row in rows], [getattr(row, f"{side}_ended", True) for row in rows]
            sides.append(encode_pairs(self.tokenizer, prompts, texts, self.reward.max_length, ended))
        return list(zip(*sides, strict=True))

    def collate(self, rows: list[Pair]) -> Sequences:
        """Row 2i is pair i's chosen text, row 2i + 1 its rejected one."""
        texts = [text for pair in rows for text in pair]
        return Sequences.from_lists([prompt for prompt, _ in texts], [response for _, response in texts])

    def microbatches(self, batch: Sequences) -> list[Tensor]:
        """Pairs stay together: groups by the longer text of each."""
        longest = batch.lengths.view(-1, 2).max(1).values.tolist()
        groups = self.roles.groups([2 * length for length in longest], self.settings.microbatch_tokens)
        return [
            torch.tensor([2 * i + side for i in group for side in (0, 1)], device=batch.ids.device) for group in groups
        ]

    def margins(self, batch: Sequences) -> Tensor:
        """r(chosen) − r(rejected) per pair."""
        scores = self.roles.last_token_scores("reward", batch).view(-1, 2)
        return scores[:, 0] - scores[:, 1]

    def training_step(self, batch: Sequences, index: int) -> None:
        """One optimiser step."""
        self.roles.train()
        lr = self.current_lr

        def loss(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            margins = self.margins(batch.rows(rows))
            return -F.logsigmoid(margins).sum(), {"right": (margins > 0).sum()}

        pairs = len(batch) // 2
        result = self.accumulate(self.microbatches(batch), loss, pairs)
        self.advance_schedule()
        step = self.trainer.global_step
        self.note_skipped(result, step, batch)
        if step % self.settings.log_every == 0 or step == self.total_steps:
            metrics: dict[str, Tensor | float] = {
                "reward/loss": result.sums["loss"] / result.count,
                "reward/train_accuracy": result.sums["right"] / result.count,
                "reward/grad_norm": result.grad_norm,
                "reward/lr": lr,
            }
            self.emit(metrics, step, bar=["reward/loss"])

    def on_validation_epoch_start(self) -> None:
        """Begin a measurement."""
        self._margins = []

    def validation_step(self, batch: Sequences, index: int) -> None:
        """Measure a batch of held-out comparisons, the processes taking turns."""
        if index % collectives.size() != collectives.rank():
            return
        self._margins += [self.margins(batch.rows(rows)) for rows in self.microbatches(batch)]

    def on_validation_epoch_end(self) -> None:
        """Accuracy and margin over all held-out comparisons."""
        margins = torch.cat(collectives.all_gather(torch.cat(self._margins).cpu() if self._margins else torch.empty(0)))
        metrics = {
            "reward/validation_loss": -F.logsigmoid(margins).mean(),
            "reward/accuracy": ((margins > 0).float() + 0.5 * (margins == 0).float()).mean(),
            "reward/margin": margins.mean(),
        }
        self.emit(metrics, self.steps_done, bar=["reward/accuracy"])

    @torch.no_grad()
    def baseline(self, rows: Sequence[Demonstration]) -> float:
        """Mean score of demonstrations, which is subtracted from every score so that rewards start near 0."""
        pairs = encode_pairs(
            self.tokenizer, [row.prompt for row in rows], [row.response for row in rows], self.reward.max_length
        )
        total = 0.0
        for group in self.roles.groups([len(p) + len(r) for p, r in pairs], self.settings.microbatch_tokens):
            batch = Sequences.from_lists([pairs[i][0] for i in group], [pairs[i][1] for i in group]).to(
                self.roles.device
            )
            total += float(self.roles.last_token_scores("reward", batch).sum())
        return total / len(pairs)
