"""A policy that learns from fixed rows, one optimiser step per batch, and is measured as that of PPO."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from rlhf.distributed import collectives
from rlhf.guards import Guards
from rlhf.guards.base import Remedies
from rlhf.models.roles import Roles
from rlhf.policy_settings import PolicySettings
from rlhf.rollout.factory import make_engine
from rlhf.seeding import mixed_seed
from rlhf.settings import Settings
from rlhf.stages.batches import SeededBatches, loader
from rlhf.stages.evaluation import Evaluator, PolicyEvaluation, Scorer
from rlhf.stages.passes import own_stream, replayed_dropout
from rlhf.stages.supervised import SupervisedStage


class SupervisedPolicy(PolicyEvaluation, SupervisedStage):
    """Trains the role `policy` with a loss of `SupervisedStage`, and measures it as `PolicyEvaluation` does.

    `own` are the settings of the method, which name its batch. `scorer` gives a number per rollout, `evaluator` the
    metrics and a record per answer. Everything random is drawn from (seed, purpose, step), dropout masks too, so a run
    continues from any step as if it had never stopped.
    """

    def __init__(
        self,
        config: Settings,
        own: PolicySettings,
        roles: Roles,
        tokenizer: PreTrainedTokenizerBase,
        scorer: Scorer,
        evaluator: Evaluator,
        samples: Path,
    ):
        settings = dataclasses.replace(own, lr=own.lr if config.lora.r else own.lr_full)
        super().__init__(settings, roles, tokenizer, own.steps)
        self.config, self.settings, self.lr_ratio = config, settings, config.lora.lr_ratio
        self.engine = make_engine(config.generation, tokenizer, roles)
        self.scorer, self.evaluator, self.samples = scorer, evaluator, samples
        exact = roles.in_float32 and config.quantization is None
        self.guards = Guards(config.guards.at_precision(exact), samples.parent, Remedies.of(config, own))
        self.dropout = config.lora.r > 0 and config.lora.dropout > 0
        self.last_evaluation: dict[str, float] = {}

    @property
    def batch_size(self) -> int:
        """Rows of an optimiser step, over all processes."""
        raise NotImplementedError

    def loader(self, rows: Sequence[Any], start: int) -> DataLoader:
        """This process's share of each batch of rows."""
        share = slice(collectives.rank(), None, collectives.size())
        batches = SeededBatches(len(rows), self.batch_size, self.config.seed, self.total_steps, start, share)
        return loader(rows, self.collate, batches)

    def training_step(self, batch: Any, index: int) -> None:
        """One optimiser step on a batch, under dropout masks of its own."""
        seed = mixed_seed(self.config.seed, own_stream(f"{self.prefix} dropout"), self.steps_done + 1)
        with replayed_dropout(seed, self.dropout, self.roles.device):
            super().training_step(batch, index)
