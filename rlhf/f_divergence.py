"""Divergences beside the KL and Jensen–Shannon: the α family, χ², Rényi, total variation and Hellinger.

All but Rényi's are f-divergences D(π_θ ‖ π_ref) = E[e^(−δ) f(e^δ)] under π_θ, with δ = log π_θ(y) − log π_ref(y).
Adding a multiple of e^(−δ) − 1, whose mean is 0, gives f the slope 0 at 1, so that an estimator e^(−δ) f(e^δ) is never
negative, and 0 at δ = 0, as k3 is (`rlhf.divergence.bregman`). Estimators take log-probabilities of tokens sampled from
π_θ; functions named exact_… take logits, divided by the temperature, in chunks of tokens.

As a *reward* no estimator here but total variation pulls towards the reference to first order, for the reason that k3
does not (docs/divergences.md). In the loss with `kl.importance_weight`, or in both, they have the gradient of what they
estimate. An exponent is at most 10 (`rlhf.divergence.MAX_EXPONENT`): beyond it, an estimator is constant and biased
downwards. Expectations also assume that π_θ can sample whatever π_ref can.

Sources: Csiszár 1967 (f-divergences), Amari 2016, section 3.5 (α), van Erven & Harremoës 2014 (Rényi), Tsybakov 2009,
section 2.4 (Hellinger, total variation, and inequalities between them).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.divergence import MAX_EXPONENT, bregman, exact_kl


def alpha_divergence(
    logprobs: Float[Tensor, "batch time"], ref_logprobs: Float[Tensor, "batch time"], alpha: float = 0.5
) -> Float[Tensor, "batch time"]:
    """(α + (1 − α) w − w^(1−α)) / (α (1 − α)) with w = e^(−δ): unbiased for `exact_alpha_divergence`, never negative.

    The limits are k3 at α = 1 and the estimator of the forward KL, w log w − w + 1, at α = 0.

    Raises:
        ValueError: α is below 0.
    """
    _check_alpha(alpha, zero=True)
    if alpha == 1:
        return bregman(logprobs, ref_logprobs)
    # x = log w; both exponents, x and (1 − α) x, are at most 10
    x = (ref_logprobs - logprobs).clamp(max=MAX_EXPONENT, min=-MAX_EXPONENT / (alpha - 1) if alpha > 1 else None)
    if alpha == 0:
        return x.exp() * x - torch.expm1(x)
    return ((1 - alpha) * torch.expm1(x) - torch.expm1((1 - alpha) * x)) / (alpha * (1 - alpha))


def forward_kl(
    logprobs: Float[Tensor, "batch time"], ref_logprobs: Float[Tensor, "batch time"]
) -> Float[Tensor, "batch time"]:
    """w log w − w + 1 with w = π_ref/π_θ: unbiased for KL(π_ref ‖ π_θ), never negative, of high variance (nats).

    What π_θ hardly samples contributes most, and rarely: below δ = −10 it is bounded, hence biased downwards.
    """
    return alpha_divergence(logprobs, ref_logprobs, 0.0)


def chi_squared(
    logprobs: Float[Tensor, "batch time"], ref_logprobs: Float[Tensor, "batch time"]
) -> Float[Tensor, "batch time"]:
    """e^δ − 2 + e^(−δ): unbiased for χ²(π_θ ‖ π_ref), never negative, even in δ; twice `alpha_divergence` at 2."""
    return 2 * alpha_divergence(logprobs, ref_logprobs, 2.0)


def renyi(
    logprobs: Float[Tensor, "batch time"], ref_logprobs: Float[Tensor, "batch time"], alpha: float = 0.5
) -> Float[Tensor, "batch time"]:
    """α times the estimator of `alpha_divergence`: *biased* for `exact_renyi`, the log of a mean, which no token gives.

    Its own mean is (E[e^((α−1) δ)] − 1) / (α − 1). Since log x ≤ x − 1, that is never below Rényi's divergence for
    α > 1 and never above it for α < 1; near the reference the two agree. At α = 1 it is k3.

    Raises:
        ValueError: α is not above 0.
    """
    _check_alpha(alpha)
    return alpha * alpha_divergence(logprobs, ref_logprobs, alpha)


def total_variation(
    logprobs: Float[Tensor, "batch time"], ref_logprobs: Float[Tensor, "batch time"]
) -> Float[Tensor, "batch time"]:
    """max(0, 1 − e^(−δ)): unbiased for the total variation ½ Σ |π_θ − π_ref|, within [0, 1].

    ½ |1 − e^(−δ)| has the same mean, but no bound. Like the clamped KL, this one penalises only what became likelier.
    """
    return -torch.expm1((ref_logprobs - logprobs).clamp(max=0))


def hellinger(
    logprobs: Float[Tensor, "batch time"], ref_logprobs: Float[Tensor, "batch time"]
) -> Float[Tensor, "batch time"]:
    """½ (1 − e^(−δ/2))²: unbiased for the squared Hellinger distance, never negative; a quarter of
    `alpha_divergence` at ½."""
    return torch.expm1((ref_logprobs - logprobs).clamp(max=MAX_EXPONENT) / 2).square() / 2


def exact_alpha_divergence(
    logits: Float[Tensor, "batch time vocabulary"],
    ref_logits: Float[Tensor, "batch time vocabulary"],
    alpha: float = 0.5,
) -> Float[Tensor, "batch time"]:
    """(1 − Σ π_θ^α π_ref^(1−α)) / (α (1 − α)): KL(π_θ ‖ π_ref) at α = 1, KL(π_ref ‖ π_θ) at 0, never negative.

    Rounding errors grow with 1 / (α (1 − α)). For α > 1, a token's factor (π_θ/π_ref)^(α−1) is at most e^10.

    Raises:
        ValueError: α is below 0.
    """
    _check_alpha(alpha, zero=True)
    if alpha in (0, 1):
        return exact_kl(logits, ref_logits) if alpha else exact_forward_kl(logits, ref_logits)
    logprobs, ref_logprobs = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    exponent = (alpha - 1) * (logprobs - ref_logprobs)
    if alpha > 1:
        exponent = exponent.clamp(max=MAX_EXPONENT)
    mixed = torch.where(logprobs > -torch.inf, (logprobs + exponent).exp(), 0.0)
    # each token's own part is never negative, so that nothing cancels between tokens
    parts = alpha * logprobs.exp() + (1 - alpha) * ref_logprobs.exp() - mixed
    return parts.sum(-1) / (alpha * (1 - alpha))


def exact_forward_kl(
    logits: Float[Tensor, "batch time vocabulary"], ref_logits: Float[Tensor, "batch time vocabulary"]
) -> Float[Tensor, "batch time"]:
    """KL(π_ref ‖ π_θ), in nats: not bounded, and infinite where π_θ rules out a token that π_ref does not."""
    return exact_kl(ref_logits, logits)


def exact_chi_squared(
    logits: Float[Tensor, "batch time vocabulary"], ref_logits: Float[Tensor, "batch time vocabulary"]
) -> Float[Tensor, "batch time"]:
    """χ²(π_θ ‖ π_ref) = Σ π_θ²/π_ref − 1, never negative; a token's ratio π_θ/π_ref is at most e^10."""
    return 2 * exact_alpha_divergence(logits, ref_logits, 2.0)


def exact_renyi(
    logits: Float[Tensor, "batch time vocabulary"],
    ref_logits: Float[Tensor, "batch time vocabulary"],
    alpha: float = 0.5,
) -> Float[Tensor, "batch time"]:
    """log Σ π_θ^α π_ref^(1−α) / (α − 1), in nats: grows with α, KL(π_θ ‖ π_ref) at α = 1, never negative.

    Rounding errors grow with 1 / |α − 1|.

    Raises:
        ValueError: α is not above 0.
    """
    _check_alpha(alpha)
    if alpha == 1:
        return exact_kl(logits, ref_logits)
    logprobs, ref_logprobs = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    terms = alpha * logprobs + (1 - alpha) * ref_logprobs
    return torch.where(logprobs > -torch.inf, terms, -torch.inf).logsumexp(-1) / (alpha - 1)


def exact_total_variation(
    logits: Float[Tensor, "batch time vocabulary"], ref_logits: Float[Tensor, "batch time vocabulary"]
) -> Float[Tensor, "batch time"]:
    """½ Σ |π_θ − π_ref|: within [0, 1]."""
    return (logits.float().softmax(-1) - ref_logits.float().softmax(-1)).abs().sum(-1) / 2


def exact_hellinger(
    logits: Float[Tensor, "batch time vocabulary"], ref_logits: Float[Tensor, "batch time vocabulary"]
) -> Float[Tensor, "batch time"]:
    """The squared Hellinger distance ½ Σ (√π_θ − √π_ref)² = 1 − Σ √(π_θ π_ref): within [0, 1]."""
    roots = [(x.float().log_softmax(-1) / 2).exp() for x in (logits, ref_logits)]
    return (roots[0] - roots[1]).square().sum(-1) / 2


def _check_alpha(alpha: float, zero: bool = False) -> None:
    if not (0 < alpha < math.inf or (zero and alpha == 0)):
        raise ValueError(f"alpha={alpha} is not allowed; allowed: a number {'of 0 or above' if zero else 'above 0'}")
