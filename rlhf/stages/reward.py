"""Reward modelling: a scalar head on the supervised model, trained on pairwise preferences."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from operator import itemgetter

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.records import Comparison, Demonstration
from rlhf.distributed import collectives
from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences, concatenate
from rlhf.models.tokenizing import encode_pairs
from rlhf.settings import RewardSettings
from rlhf.stages.cutting import Encoded
from rlhf.stages.supervised import SupervisedStage

Pair = tuple[Encoded, Encoded]  # chosen and rejected


def longer_accuracy(rows: Sequence[Comparison]) -> float:
    """The accuracy of always preferring the answer with more characters; a tie counts ½."""
    lengths = [(len(row.chosen), len(row.rejected)) for row in rows]
    return statistics.fmean(0.5 if chosen == rejected else float(chosen > rejected) for chosen, rejected in lengths)


def accuracy_by_kind(
    rows: Sequence[Comparison], margins: Sequence[float], kinds: Sequence[str]
) -> dict[str, dict[str, float]]:
    """For each kind of comparison the number of `pairs`, and the accuracies of the margins and of `length` alone."""
    table: dict[str, dict[str, float]] = {}
    for kind, count in Counter(kinds).most_common():
        places = [place for place, name in enumerate(kinds) if name == kind]
        right = [0.5 if margins[place] == 0 else float(margins[place] > 0) for place in places]
        length = longer_accuracy([rows[place] for place in places])
        table[kind] = {"pairs": count, "accuracy": statistics.fmean(right), "longer_accuracy": length}
    return table


class RewardModeling(SupervisedStage):
    """−log σ(r(chosen) − r(rejected)), the score read at each text's last token (Stiennon et al. 2020, section 3.4).

    `roles` needs a role `reward` with a head. On held-out comparisons it logs `reward/validation_loss`,
    `reward/accuracy` (a tie counts ½) and `reward/margin`. Chosen and rejected go through the model together.
    """

    prefix = "reward"

    def __init__(self, settings: RewardSettings, roles: Roles, tokenizer: PreTrainedTokenizerBase, total_steps: int):
        super().__init__(settings, roles, tokenizer, total_steps)
        self.reward = settings
        self._margins: list[tuple[int, Tensor]] = []
        self.held_out_margins: list[float] = []

    def encode(self, rows: Sequence[Comparison]) -> list[Pair]:
        """(chosen, rejected) of each comparison, both as (prompt ids, response ids)."""
        prompts, sides = [row.prompt for row in rows], []
        for side in ("chosen", "rejected"):
            texts, ended = [getattr(row, side) for row in rows], [getattr(row, f"{side}_ended", True) for row in rows]
            sides.append(encode_pairs(self.tokenizer, prompts, texts, self.reward.max_length, ended))
        return list(zip(*sides, strict=True))

    def collate(self, rows: list[Pair]) -> Sequences:
        """A batch in which row 2i is pair i's chosen text, and row 2i + 1 its rejected one."""
        texts = [text for pair in rows for text in pair]
        return Sequences.from_lists([prompt for prompt, _ in texts], [response for _, response in texts])

    def microbatches(self, batch: Sequences) -> list[Tensor]:
        """Groups of whole pairs, sorted by the longer text of each pair."""
        longest = batch.lengths.view(-1, 2).max(1).values.tolist()
        groups = self.roles.groups([2 * length for length in longest], self.settings.microbatch_tokens)
        return [
            torch.tensor([2 * i + side for i in group for side in (0, 1)], device=batch.ids.device) for group in groups
        ]

    def count(self, batch: Sequences) -> int:
        """The number of pairs."""
        return len(batch) // 2

    def margins(self, batch: Sequences) -> Float[Tensor, "pairs"]:
        """r(chosen) − r(rejected) of each pair."""
        scores = self.roles.last_token_scores("reward", batch).view(-1, 2)
        return scores[:, 0] - scores[:, 1]

    def loss(self, batch: Sequences) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """−log σ(margin) summed over the pairs, and how many pairs are ranked correctly."""
        margins = self.margins(batch)
        return -F.logsigmoid(margins).sum(), {"right": (margins > 0).sum()}

    def training_metrics(self, sums: Mapping[str, Tensor], count: Tensor) -> dict[str, Tensor]:
        """The accuracy on the batch itself."""
        return {"train_accuracy": sums["right"] / count}

    def on_validation_epoch_start(self) -> None:
        """Begin a measurement on the held-out comparisons."""
        self._margins = []

    def validation_step(self, batch: Sequences, index: int) -> None:
        """Measure a batch of held-out comparisons."""
        if self.has_turn(index):
            groups = self.microbatches(batch)
            order = (torch.cat(groups)[::2] // 2).tolist()
            self._margins.append((index, concatenate([self.margins(batch.rows(rows)) for rows in groups], order).cpu()))

    def on_validation_epoch_end(self) -> None:
        """Log loss, accuracy and margin over all held-out comparisons; keep their margins, in order."""
        parts = [part for process in collectives.all_gather(self._margins) for part in process]
        margins = torch.cat([part for _, part in sorted(parts, key=itemgetter(0))])
        self.held_out_margins = margins.tolist()
        metrics = {
            "reward/validation_loss": -F.logsigmoid(margins).mean(),
            "reward/accuracy": ((margins > 0).float() + 0.5 * (margins == 0).float()).mean(),
            "reward/margin": margins.mean(),
        }
        self.emit(metrics, self.steps_done, bar=["reward/accuracy"])

    @torch.no_grad()
    def baseline(self, rows: Sequence[Demonstration]) -> float:
        """Mean score of demonstrations. It is subtracted from every score, so that rewards start near 0."""
        pairs = encode_pairs(
            self.tokenizer, [row.prompt for row in rows], [row.response for row in rows], self.reward.max_length
        )
        total = 0.0
        for group in self.roles.groups([len(p) + len(r) for p, r in pairs], self.settings.microbatch_tokens):
            batch = Sequences.from_lists([pairs[i][0] for i in group], [pairs[i][1] for i in group])
            total += float(self.roles.last_token_scores("reward", batch.to(self.roles.device)).sum())
        return total / len(pairs)
