"""The settings of what trains a policy: what all methods share, the methods beside PPO, and parts of PPO.

Those of PPO are in `rlhf.settings`, with everything else.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import omegaconf

from rlhf.schema import at_least_zero, checked, choice, number_or_list, optional_positive, positive

# Stages that train a policy; each has a config group of its name.
METHODS = ("ppo", "dpo", "best_of_n", "expert_iteration")
FROM_COMPARISONS = ("dpo",)  # those that learn from comparisons: a scorer only measures what they have learnt


@dataclass
class OptimizerSettings:
    """What all stages share: AdamW, its schedule, and the tokens that go through the model at once.

    `group` is the config group of a stage.
    """

    group = ""
    lr: float = positive()
    warmup_steps: int = at_least_zero(0)
    schedule: str = choice("linear", "cosine", "constant")
    weight_decay: float = at_least_zero(0.0)
    adam_eps: float = positive(1e-8)
    max_grad_norm: float | None = optional_positive(1.0)
    microbatch_tokens: int = positive(4096)
    log_every: int = positive(10)
    checkpoint_every: int = positive(50)


@dataclass
class PolicySettings(OptimizerSettings):
    """What all methods share: how long the policy is trained, when it is measured, and which policies are kept."""

    lr_full: float = positive()
    steps: int = positive()
    eval_every: Any = number_or_list()
    keep_evaluated: bool = False
    patience: int | None = optional_positive()
    min_gain: float = at_least_zero(0.0)
    keep_best: str | None = "auto"
    keep_best_mode: str = choice("max", "min")

    def evaluates(self, step: int) -> bool:
        """Whether the policy is measured after a step: before the first, after the last, and as `eval_every` says."""
        chosen = step in self.eval_every if isinstance(self.eval_every, list) else step % self.eval_every == 0
        return chosen or step in (0, self.steps)

    def nearer(self, penalised: bool) -> str:
        """What would hold the policy nearer to the SFT model; `penalised` says whether a divergence is chosen."""
        return "a larger kl.coef" if penalised else "a penalty such as divergence=kl"

    @property
    def eval_interval(self) -> int:
        """The largest interval such that every evaluation between the first and the last is due at a multiple of it."""
        return math.gcd(*self.eval_every) if isinstance(self.eval_every, list) else self.eval_every


@dataclass
class DPOSettings(PolicySettings):
    """`conf/dpo`: direct preference optimisation. A step is an optimiser step on a batch of comparisons."""

    group = "dpo"
    batch_size: int = positive()
    max_length: int = positive()
    validation_size: int = positive(500)
    loss: str = choice("sigmoid", "ipo", "hinge")
    divergence: str = choice("reverse_kl", "forward_kl", "jensen_shannon", "alpha_divergence", "chi_squared_kl")
    beta: float = positive(0.1)
    alpha: float = checked(lambda x: 0 < x < 1, "a number between 0 and 1", 0.5)
    clip: float | None = optional_positive()
    label_smoothing: float = checked(lambda x: 0 <= x < 0.5, "a number from 0 to below 0.5", 0.0)
    unbiased: bool = False
    mean_logprobs: bool = False
    sft_coef: float = at_least_zero(0.0)

    def nearer(self, penalised: bool) -> str:
        """The weight of the divergence from the SFT model; the penalty in a reward plays no part."""
        return "a larger dpo.beta"


@dataclass
class BestOfNSettings(PolicySettings):
    """`conf/best_of_n`: best-of-n distillation. A step is an optimiser step on a batch of best answers."""

    group, rounds = "best_of_n", 1
    n: int = positive()
    batch_size: int = positive()
    epochs: int = positive(1)
    missing_eos_penalty: float = at_least_zero(0.0)

    @property
    def steps_per_round(self) -> int:
        """Optimiser steps between two samplings; `rlhf.pipeline.training_checks` refuses a remainder."""
        return self.steps // self.rounds

    @property
    def prompts_per_round(self) -> int:
        """Prompts that are answered n times each, in every round."""
        return self.steps_per_round * self.batch_size // self.epochs

    def nearer(self, penalised: bool) -> str:
        """The best of fewer answers is likelier under the policy; the penalty in a reward plays no part."""
        return f"a smaller {self.group}.n"


@dataclass
class ExpertIterationSettings(BestOfNSettings):
    """`conf/expert_iteration`: the same in several rounds, each from the policy of the last one."""

    group = "expert_iteration"
    rounds: int = positive()


@dataclass
class DivergenceSettings:
    """`conf/divergence`: a function, and its input: log-probs of the sampled token, whole logits, or nothing.

    All other keys, such as `alpha`, are `parameters`: keyword arguments of the function.
    """

    name: str = omegaconf.MISSING
    function: str = omegaconf.MISSING
    input: str = choice("logprobs", "logits", "none")
    parameters: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def keys(cls, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of a YAML, those of the function moved to `parameters`."""
        own = ("name", "function", "input")
        parameters = {key: value for key, value in chosen.items() if key not in own}
        return {key: value for key, value in chosen.items() if key in own} | {"parameters": parameters}


@dataclass
class LossTermSettings:
    """`conf/loss_terms`: a further term of the policy's loss, a function of `rlhf.stages.loss_terms.PolicyTokens`."""

    function: str = omegaconf.MISSING
    coef: float = 1.0


@dataclass
class AdvantagesSettings:
    """`conf/advantages`: a function (`rlhf.advantages`) with its keywords, and what it compares an answer with."""

    name: str = "gae"
    function: str = "rlhf.advantages.gae"
    baseline: str = choice("value", "group", "greedy", "none")
    options: dict[str, Any] = field(default_factory=dict)
