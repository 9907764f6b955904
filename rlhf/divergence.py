"""How far the policy is from the reference policy: one pure function per estimator.

With δ = log π_θ(y) − log π_ref(y), both at the sampling temperature, an estimator gives a penalty per token that PPO
subtracts from the reward as β · d (Sun, Gupta & Iyyer 2023, section 3). Some estimators read only the log-probability
of the sampled token; the exact ones sum over the whole vocabulary. The config option says which (`input: logprobs |
logits | none`), so that a new divergence is one function here and one YAML in `conf/divergence`.

Padding in the inputs gives meaningless values in the result: mask them.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from hydra.utils import get_method
from jaxtyping import Float
from torch import Tensor

from rlhf.policy_settings import DivergenceSettings

Divergence = Callable[[Tensor, Tensor], Tensor]
# e^10 = 22,026. Beyond it, one token would outweigh all other rewards of a rollout batch; e^88 overflows float32.
MAX_EXPONENT = 10.0


def configured(settings: DivergenceSettings) -> Divergence:
    """The function that `conf/divergence` names, with the other keys of its YAML as keyword arguments."""
    return partial(get_method(settings.function), **settings.parameters)


def kl(logprobs: Float[Tensor, "batch time"], ref_logprobs: Float[Tensor, "batch time"]) -> Float[Tensor, "batch time"]:
    """k1 = δ: unbiased for KL(π_θ ‖ π_ref) under samples of π_θ, of high variance, negative for some tokens (nats).

    The only estimator here whose gradient as a reward is, in expectation, that of the KL (docs/divergences.md).
    """
    return logprobs - ref_logprobs


def clamped_kl(
    logprobs: Float[Tensor, "batch time"], ref_logprobs: Float[Tensor, "batch time"]
) -> Float[Tensor, "batch time"]:
    """max(0, δ): AlpacaFarm's default. Biased upwards, because it ignores tokens that became less likely (nats)."""
    return (logprobs - ref_logprobs).clamp(min=0)


def bregman(
    logprobs: Float[Tensor, "batch time"], ref_logprobs: Float[Tensor, "batch time"]
) -> Float[Tensor, "batch time"]:
    """k3 = e^(−δ) − 1 + δ: its *value* is unbiased for KL(π_θ ‖ π_ref), never negative (Schulman 2020).

    Its gradient as a reward is not the KL's: near the reference it vanishes to first order, and far from it
    it pushes tokens that have become rare further down (docs/divergences.md).

    The exponent is bounded at 10 (a value of 22,015), so that one very unlikely token cannot drown a batch; below
    δ = −10 the estimator is therefore biased downwards.
    """
    delta = logprobs - ref_logprobs
    return torch.expm1((-delta).clamp(max=MAX_EXPONENT)) + delta.clamp(min=-MAX_EXPONENT)


def squared_error(
    logprobs: Float[Tensor, "batch time"], ref_logprobs: Float[Tensor, "batch time"]
) -> Float[Tensor, "batch time"]:
    """k2 = δ² / 2: a biased value, never negative, symmetric in δ (Schulman 2020). As a reward it does not pull
    near δ = 0.
    """
    return (logprobs - ref_logprobs).square() / 2


def jensen_shannon(
    logprobs: Float[Tensor, "batch time"], ref_logprobs: Float[Tensor, "batch time"]
) -> Float[Tensor, "batch time"]:
    """½ max(0, log π_θ − log m) + ½ max(0, log π_ref − log m), m = (π_θ + π_ref) / 2: the paper's estimator.

    Symmetric in δ and bounded by ½ ln 2, so that no single token dominates. As a reward it hardly pulls at any
    distance, even near the reference. The reason is not the bound but that it is even in δ (docs/divergences.md). This
    is the formula of the published code, and not an unbiased estimate of the Jensen–Shannon divergence, for which see
    `exact_jensen_shannon`.
    """
    mixture = torch.logaddexp(logprobs, ref_logprobs) - math.log(2)
    return ((logprobs - mixture).clamp(min=0) + (ref_logprobs - mixture).clamp(min=0)) / 2


def none(
    logprobs: Float[Tensor, "batch time"], ref_logprobs: Float[Tensor, "batch time"]
) -> Float[Tensor, "batch time"]:
    """0: no penalty. Training then needs no reference pass (`input: none`)."""
    return torch.zeros_like(logprobs)


def negative_kl(
    logprobs: Float[Tensor, "batch time"], ref_logprobs: Float[Tensor, "batch time"]
) -> Float[Tensor, "batch time"]:
    """−δ: rewards distance from the reference, the paper's probe for over-optimisation (figure 3)."""
    return ref_logprobs - logprobs


def exact_kl(
    logits: Float[Tensor, "batch time vocabulary"], ref_logits: Float[Tensor, "batch time vocabulary"]
) -> Float[Tensor, "batch time"]:
    """KL(π_θ ‖ π_ref) of the next-token distributions, in nats: the expectation that k1 and k3 estimate.

    The logits must already be divided by the sampling temperature. Callers pass chunks of tokens, never a whole batch.
    """
    logprobs, ref_logprobs = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    return _expected(logprobs, logprobs - ref_logprobs)


def exact_jensen_shannon(
    logits: Float[Tensor, "batch time vocabulary"], ref_logits: Float[Tensor, "batch time vocabulary"]
) -> Float[Tensor, "batch time"]:
    """½ KL(π_θ ‖ m) + ½ KL(π_ref ‖ m), m = (π_θ + π_ref) / 2, in nats: symmetric, within [0, ln 2]."""
    logprobs, ref_logprobs = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    mixture = torch.logaddexp(logprobs, ref_logprobs) - math.log(2)
    return (_expected(logprobs, logprobs - mixture) + _expected(ref_logprobs, ref_logprobs - mixture)) / 2


def _expected(
    logprobs: Float[Tensor, "*batch vocabulary"], values: Float[Tensor, "*batch vocabulary"]
) -> Float[Tensor, "*batch"]:
    """Σ p · value over the vocabulary, where 0 · anything is 0: an impossible token has log-probability −inf."""
    return torch.where(logprobs > -torch.inf, logprobs.exp() * values, 0.0).sum(-1)
