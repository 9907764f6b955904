"""What supervised fine-tuning and reward modelling share: fixed rows, one optimiser step per batch."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.distributed import collectives
from rlhf.guards.base import SKIPPED
from rlhf.models.roles import Roles
from rlhf.policy_settings import OptimizerSettings
from rlhf.stages.base import Stage


class SupervisedStage(Stage):
    """Trains on rows that are encoded once; `roles` are the models, of which whatever requires a gradient is trained.

    A subclass says how rows become batches (`encode`, `collate`), what the loss of a batch is (`loss`, summed over
    `count` targets), and how it is measured on held-out rows (`validation_step`, `on_validation_epoch_end`). `prefix`
    begins the names of its metrics.
    """

    prefix: str

    def __init__(
        self,
        settings: OptimizerSettings,
        roles: Roles,
        tokenizer: PreTrainedTokenizerBase,
        total_steps: int,
    ):
        super().__init__(settings, total_steps)
        self.roles, self.tokenizer = roles, tokenizer

    def encode(self, rows: Sequence[Any]) -> list[Any]:
        """Token ids of each row."""
        raise NotImplementedError

    def collate(self, rows: list[Any]) -> Any:
        """Encoded rows as a batch, which has `rows` and `tensors` as `Sequences` have."""
        raise NotImplementedError

    def count(self, batch: Any) -> int:
        """How many targets the loss of a batch is summed over."""
        raise NotImplementedError

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over the targets of a micro-batch, and other sums to report."""
        raise NotImplementedError

    def training_metrics(self, sums: Mapping[str, Tensor], count: Tensor) -> dict[str, Tensor]:
        """Metrics of a step besides its loss, from the other sums."""
        return {}

    def training_step(self, batch: Any, index: int) -> None:
        """One optimiser step on a batch."""
        self.roles.train()
        lr = self.current_lr
        parts = self.microbatches(batch)
        result = self.accumulate(parts, lambda rows: [self.loss(batch.rows(rows))], self.count(batch))
        self.advance_schedule()
        step = self.trainer.global_step
        if result.skip_reason:
            self.guards.save_batch(step, batch.tensors(), result.skip_reason)  # this process's share of the batch
            self.emit({SKIPPED: 1.0}, step)
        if step % self.settings.log_every == 0 or step == self.total_steps:
            metrics: dict[str, Tensor | float] = {
                "loss": result.sums["loss"] / result.count,
                **self.training_metrics(result.sums, result.count),
            }
            metrics |= {"grad_norm": result.grad_norm, "lr": lr}
            named = {f"{self.prefix}/{key}": value for key, value in metrics.items()}
            self.emit(named, step, bar=[f"{self.prefix}/loss"])

    def has_turn(self, index: int) -> bool:
        """Whether this process measures the held-out batch `index`: the processes take turns."""
        return index % collectives.size() == collectives.rank()
