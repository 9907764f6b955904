"""Scorers turn rollouts into rewards: a learned reward model, a text classifier, the data set's utility, a function."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.records import DataSource
from rlhf.data.special_tokens import unmarked
from rlhf.models.roles import Roles
from rlhf.rollout.sample import Rollouts


@dataclass
class Context:
    """What scorers and judges may use.

    `reward_baseline` is the reward model's mean score of demonstrations. `microbatch_tokens` limits the tokens per
    forward pass. `cache` is the folder that all runs share. `reward` is the reward model if it is no role, because it
    is made from another model or has another tokenizer than the policy. `members` are the roles of further
    reward models, each with its mean score of demonstrations.
    """

    source: DataSource
    tokenizer: PreTrainedTokenizerBase
    roles: Roles
    reward_baseline: float = 0.0
    microbatch_tokens: int = 4096
    cache: Path = Path("outputs/cache")
    reward: "TextScorer | None" = None
    members: Sequence[tuple[str, float]] = ()


@dataclass
class TextContext(Context):
    """What judges and scorers of texts may use where no run's models are loaded."""

    tokenizer: Any = None
    roles: Any = None


class Scorer(Protocol):
    """Gives each rollout a score, or each of its tokens a reward; PPO applies its penalties later.

    Constructed with a `Context` and the keys of its YAML file as keyword arguments. The rewards of a rollout's tokens
    add up to its score, and are 0 on padding. A scorer that asks several judges may keep an attribute `spread`, their
    standard deviation for each rollout of the last call.
    """

    needs_reward_model: ClassVar[bool]

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "batch *response"]: ...  # noqa: D102


class TextScorer(ABC):
    """A scorer of decoded texts. With `scorer@evaluation.gold` it can also be the gold utility of an evaluation."""

    needs_reward_model: ClassVar[bool] = False

    @abstractmethod
    def rate(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[Tensor, "batch"]:
        """The score of each response to its prompt."""

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "batch"]:
        """The score of each rollout."""
        return self.rate(rollouts.prompts, rollouts.responses).to(rollouts.ended.device)


def totals(scores: Float[Tensor, "batch *response"]) -> Float[Tensor, "batch"]:
    """The score of each rollout: rewards per token are summed."""
    return scores if scores.ndim == 1 else scores.sum(1)


def scores_texts(target: Any) -> bool:
    """Whether what a configuration's `_target_` names is a scorer of texts."""
    return isinstance(target, type) and issubclass(target, TextScorer)


def joined(prompts: Sequence[str], responses: Sequence[str]) -> list[str]:
    """Prompt and response as one text, as people read it."""
    return [unmarked(prompt) + response for prompt, response in zip(prompts, responses, strict=True)]
