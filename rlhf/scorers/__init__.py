"""What rewards a rollout: a learned reward model, the world's own utility, or a function of yours."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.records import DataSource
from rlhf.models.roles import Roles
from rlhf.rollout.sample import Rollouts


@dataclass
class Context:
    """What scorers and judges may use: the data set, the tokenizer, the models, the reward model's baseline.

    `cache` is the folder of what all runs share.
    """

    source: DataSource
    tokenizer: PreTrainedTokenizerBase
    roles: Roles
    reward_baseline: float = 0.0
    microbatch_tokens: int = 4096
    cache: Path = Path("outputs/cache")


class Scorer(Protocol):
    """One score per rollout, before any penalty. Constructed with a `Context` and the keys of its YAML."""

    needs_reward_model: ClassVar[bool]

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "batch"]: ...  # noqa: D102
