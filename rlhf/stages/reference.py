"""What the penalty holds the policy near, and how it moves: rules, and the weights that they move.

The SFT model stays the yardstick of every run: `ppo/k1`, `ppo/k3`, the guards and `eval/true_kl` measure the distance
from it. A rule may put another model into the penalty, or reset the policy. It names the role that its weights have in
`Roles` (None: it has none), of which `moving_reference` is the one that the penalty is measured from. A rule of one's
own is a class with `role` and `move` (docs/extending.md).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from rlhf.errors import ConfigError
from rlhf.models.roles import MOVING_REFERENCE, Roles


@dataclass(frozen=True)
class Weights:
    """The trained weights of the policy, those that a rule moves, and those of the SFT model, in the same order.

    With LoRA they are the matrices A and B themselves (and DoRA's magnitudes), not the product BA. A mean of policies
    is therefore the mean of their matrices, as in the published Elastic Reset: it has the rank of the policy, and can
    take its place. The mean of the products would have a rank of its own (docs/references.md).
    """

    policy: Sequence[Tensor]
    reference: Sequence[Tensor]
    initial: Sequence[Tensor]

    @classmethod
    def of(cls, roles: Roles, role: str) -> "Weights":
        """Those of the roles `policy` and `role`; the latter is still the SFT model."""
        policy, moved = roles.parameters_of("policy"), roles.parameters_of(role)
        reference = [moved[name] for name in policy]
        if roles.table["policy"].adapter is None:  # the SFT model is there, on the base
            base = roles.trunk("reference").named_parameters()
            weights = {name.replace(".base_layer.", "."): weight for name, weight in base}
            return cls(list(policy.values()), reference, [weights[name] for name in policy])
        return cls(list(policy.values()), reference, [weight.detach().clone() for weight in reference])

    def blend(self, share: float) -> None:
        """Reference ← (1 − share) · reference + share · policy."""
        torch._foreach_lerp_(list(self.reference), list(self.policy), share)

    def reset(self) -> None:
        """Policy ← reference, then reference ← SFT model."""
        torch._foreach_copy_(list(self.policy), list(self.reference))
        for reference, initial in zip(self.reference, self.initial, strict=True):
            reference.copy_(initial)


@runtime_checkable
class Rule(Protocol):
    """How the weights of the role `role` move; `role` is None if there are none."""

    role: ClassVar[str | None]

    def move(self, step: int, kl: float, weights: Weights) -> bool:
        """Move them after `step` finished steps, in place; returns whether this counts as an update or a reset.

        `kl` is the mean of log π − log π_ref over the tokens of that step, in nats per token, from the penalty's
        reference; NaN if it was not measured.
        """


class Fixed:
    """The reference is the SFT model."""

    role: ClassVar[str | None] = None

    def move(self, step: int, kl: float, weights: Weights) -> bool:
        """Nothing moves."""
        return False


class EMA:
    """The reference is an exponential moving average of the policy: decay · reference + (1 − decay) · policy."""

    role: ClassVar[str | None] = MOVING_REFERENCE

    def __init__(self, decay: float):
        self.decay = _decay(decay)

    def move(self, step: int, kl: float, weights: Weights) -> bool:
        """Average after every step."""
        weights.blend(1 - self.decay)
        return True


class Sync:
    """The reference follows the policy from time to time (TR-DPO, Gorbatovski et al. 2024, arXiv 2404.09656).

    Every `every` steps, or once the policy is more than `at_kl` (nats per token) away from it, it becomes
    (1 − share) · reference + share · policy: the policy itself for share = 1, TR-DPO's hard update, and its soft update
    below.
    """

    role: ClassVar[str | None] = MOVING_REFERENCE

    def __init__(self, every: int | None, at_kl: float | None, share: float = 1.0):
        if every is None and at_kl is None:
            raise ConfigError("reference.every=null and reference.at_kl=null: nothing would move; allowed: one of them")
        if every is not None and every < 1:
            raise ConfigError(f"reference.every={every} is not allowed; allowed: a whole number above 0, or null")
        if at_kl is not None and not 0 < at_kl < math.inf:
            raise ConfigError(f"reference.at_kl={at_kl} is not allowed; allowed: a number above 0, or null")
        if not 0 < share <= 1:
            raise ConfigError(f"reference.share={share} is not allowed; allowed: a number above 0 and up to 1")
        self.every, self.at_kl, self.share = every, at_kl, share

    def move(self, step: int, kl: float, weights: Weights) -> bool:
        """Follow if it is time, or too far."""
        due = self.every is not None and step % self.every == 0
        far = self.at_kl is not None and kl > self.at_kl
        if due or far:
            weights.blend(self.share)
        return due or far


class Reset:
    """Elastic Reset (Noukhovitch et al. 2023, arXiv 2312.07551): the policy returns to a moving average of itself.

    After every step the average is updated as in `EMA`. Every `every` steps the policy becomes the average, and the
    average the SFT model. The penalty is measured from the SFT model. As in the published code, AdamW's moments and the
    value function stay what they are.
    """

    role: ClassVar[str | None] = "average"

    def __init__(self, every: int, decay: float):
        if every < 1:
            raise ConfigError(f"reference.every={every} is not allowed; allowed: a whole number above 0")
        self.every, self.decay = every, _decay(decay)

    def move(self, step: int, kl: float, weights: Weights) -> bool:
        """Average, and reset if it is time."""
        weights.blend(1 - self.decay)
        if step % self.every == 0:
            weights.reset()
            return True
        return False


def _decay(decay: float) -> float:
    if not 0 <= decay < 1:
        raise ConfigError(f"reference.decay={decay} is not allowed; allowed: a number from 0 to below 1")
    return decay


class Reference:
    """A rule at work in a run: the weights that it moves, how often it has, and what a checkpoint must hold of it.

    It moves at the beginning of the next step: the policy that is measured and saved after a step is the one that the
    step has trained, and the last step is not followed by a reset that nothing recovers from.
    """

    def __init__(self, rule: Rule, roles: Roles):
        self.rule, self.moves, self.kl = rule, 0, math.nan
        self.weights = None if rule.role is None else Weights.of(roles, rule.role)

    @torch.no_grad()
    def advance(self, step: int) -> None:
        """Move the weights after `step` finished steps; nothing has moved the policy before the first."""
        if self.weights is not None and step > 0:
            self.moves += bool(self.rule.move(step, self.kl, self.weights))

    def distance(self, metrics: dict[str, Any]) -> Tensor | float:
        """The mean distance of a step's tokens from the penalty's reference, in nats; the moves so far are added.

        This is what `kl=adaptive` follows: β cannot hold the policy near a model that the penalty is not measured from.
        """
        kl: Tensor | float = metrics.get("ppo/reference_k1", metrics.get("ppo/k1", math.nan))
        if self.weights is not None:
            self.kl, metrics["ppo/reference_moves"] = float(kl), self.moves
        return kl

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        if self.weights is None:
            return {}
        return {"moves": self.moves, "kl": self.kl, "weights": [weight.detach() for weight in self.weights.reference]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        if self.weights is None:
            return
        self.moves, self.kl = state["moves"], state["kl"]
        for weight, saved in zip(self.weights.reference, state["weights"], strict=True):
            weight.copy_(saved)
