"""Direct preference optimisation: a policy learns from comparisons, without a reward model and without sampling."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf import preference_losses
from rlhf.data.records import Comparison
from rlhf.distributed import collectives
from rlhf.models.roles import Roles
from rlhf.models.sequences import send, unflatten
from rlhf.policy_settings import DPOSettings
from rlhf.preference_losses import PreferenceLoss
from rlhf.settings import Settings
from rlhf.stages.evaluation import Evaluator, Scorer
from rlhf.stages.pairs import Comparisons, Pair, encode_comparisons
from rlhf.stages.passes import logprobs_of
from rlhf.stages.supervised_policy import SupervisedPolicy

HELD_OUT = 32  # held-out comparisons that are laid out at a time; they go through the models in micro-batches


def loss_of(dpo: DPOSettings) -> PreferenceLoss:
    """The loss of a comparison that the settings describe."""
    function, reward = (getattr(preference_losses, name) for name in (dpo.loss, dpo.divergence))
    return PreferenceLoss(function, reward, dpo.beta, dpo.alpha, dpo.clip, dpo.label_smoothing, dpo.unbiased)


class DPO(SupervisedPolicy):
    """A loss of log π(y|x) − log π_ref(y|x) of the two answers of a comparison (`rlhf.preference_losses`).

    Log-probs are those of whole answers at `generation.temperature`, as everywhere; with `dpo.mean_logprobs` their
    means over the tokens. The reference is the base without the policy's adapter. Its pass has the shape of the
    policy's, so that before the first step all log-ratios are exactly 0. Each text of a batch is read once, however
    many comparisons it is in.

    With every evaluation it measures the held-out comparisons: `dpo/validation_loss`, `dpo/validation_accuracy` (a tie
    counts ½) and `dpo/validation_margin`.
    """

    prefix = "dpo"

    def __init__(
        self,
        config: Settings,
        roles: Roles,
        tokenizer: PreTrainedTokenizerBase,
        scorer: Scorer,
        evaluator: Evaluator,
        samples: Path,
    ):
        super().__init__(config, config.dpo, roles, tokenizer, scorer, evaluator, samples)
        self.dpo, self.preference_loss = config.dpo, loss_of(config.dpo)
        self.held_out: list[Pair] = []

    @property
    def batch_size(self) -> int:
        """Comparisons of an optimiser step, over all processes."""
        return self.dpo.batch_size

    def encode(self, rows: Sequence[Comparison]) -> list[Pair]:
        """(chosen, rejected) of each comparison, both as (prompt ids, response ids)."""
        return encode_comparisons(self.tokenizer, rows, self.dpo.max_length)

    def collate(self, rows: list[Pair]) -> Comparisons:
        """A batch of comparisons."""
        return Comparisons.of(rows)

    def microbatches(self, batch: Comparisons) -> list[Tensor]:
        """Groups of comparisons."""
        return batch.passes(self.roles, self.settings.microbatch_tokens)

    def count(self, batch: Comparisons) -> int:
        """The number of comparisons."""
        return len(batch)

    def loss(self, batch: Comparisons) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The loss summed over the pairs, and sums of what the policy's own reward says of them."""
        texts, temperature = batch.texts, self.config.generation.temperature
        with torch.no_grad():
            reference = logprobs_of(self.roles, "reference", texts, temperature)
        policy = logprobs_of(self.roles, "policy", texts, temperature)
        mask, sides = texts.response_mask, send(batch.sides, policy.device)
        lengths = send(texts.response_lengths, policy.device)
        log_ratios = unflatten(policy - reference, mask).sum(1)
        if self.dpo.mean_logprobs:
            log_ratios = log_ratios / lengths
        chosen, rejected = log_ratios[sides].unbind(1)
        losses = self.preference_loss(chosen, rejected)
        if self.dpo.sft_coef:
            nll = -unflatten(policy, mask).sum(1) / lengths
            losses = losses + self.dpo.sft_coef * nll[sides][:, 0]
        with torch.no_grad():
            rewards = self.preference_loss.rewards(chosen), self.preference_loss.rewards(rejected)
            margins = rewards[0] - rewards[1]
            sums = {
                "accuracy": (margins > 0).sum() + 0.5 * (margins == 0).sum(),
                "margin": margins.sum(),
                "chosen_reward": rewards[0].sum(),
                "rejected_reward": rewards[1].sum(),
            }
        return losses.sum(), sums

    def training_metrics(self, sums: Mapping[str, Tensor], count: Tensor) -> dict[str, Tensor]:
        """Accuracy, margin and rewards on the batch itself, before the step."""
        return {key: value / count for key, value in sums.items() if key != "loss"}

    @torch.no_grad()
    def measured_beside(self) -> dict[str, float]:
        """Loss, accuracy and margin on the held-out comparisons; nothing where only the policy is measured."""
        if not self.held_out:
            return {}
        sums = {key: torch.zeros((), device=self.roles.device) for key in ("loss", "accuracy", "margin")}
        for index, start in enumerate(range(0, len(self.held_out), HELD_OUT)):
            batch = self.collate(self.held_out[start : start + HELD_OUT])
            for rows in self.microbatches(batch) if self.has_turn(index) else []:
                loss, found = self.loss(batch.rows(rows))
                for key, value in {"loss": loss, **found}.items():
                    if key in sums:
                        sums[key] += value
        return {
            f"dpo/validation_{key}": float(collectives.all_reduce_sum(value)) / len(self.held_out)
            for key, value in sums.items()
        }
