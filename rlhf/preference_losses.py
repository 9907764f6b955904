"""Direct preference optimisation: what a comparison costs a policy, as pure functions of its log-ratios.

With u = π(y|x) / π_ref(y|x) of a whole answer, the policy that maximises a reward r under an f-divergence from the
reference has r = β f′(u) + a term of the prompt alone (Wang et al. 2023, arXiv:2309.16240). So β f′ reads a policy as
the reward that it is optimal for, and a comparison costs the policy what the difference of the two rewards would cost a
reward model.

Here f′ is a function of log u, less its value at the reference, which cancels between two answers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# Of exponentials: e^20 = 5e8 is far beyond what saturates a loss, and e^88 overflows float32.
MAX_EXPONENT = 20.0

# -- f′ of a divergence ------------------------------------------------------------------------------------------------


def reverse_kl(log_ratio: Float[Tensor, "*texts"], alpha: float) -> Float[Tensor, "*texts"]:
    """f(u) = u log u, which is KL(π ‖ π_ref): f′ = log u, as in DPO itself (Rafailov et al. 2023, arXiv:2305.18290)."""
    return log_ratio


def forward_kl(log_ratio: Float[Tensor, "*texts"], alpha: float) -> Float[Tensor, "*texts"]:
    """f(u) = −log u, which is KL(π_ref ‖ π): f′ = 1 − 1/u, at most 1."""
    return -_expm1(-log_ratio)


def jensen_shannon(log_ratio: Float[Tensor, "*texts"], alpha: float) -> Float[Tensor, "*texts"]:
    """f(u) = u log u − (u + 1) log((u + 1) / 2), twice the Jensen–Shannon divergence: f′ = log(2u / (u + 1))."""
    return math.log(2) + F.logsigmoid(log_ratio)


def alpha_divergence(log_ratio: Float[Tensor, "*texts"], alpha: float) -> Float[Tensor, "*texts"]:
    """f(u) = (u^(1 − α) − (1 − α) u − α) / (α (α − 1)): f′ = (1 − u^−α) / α; reverse KL for α → 0, forward for 1."""
    return -_expm1(-alpha * log_ratio) / alpha


def chi_squared_kl(log_ratio: Float[Tensor, "*texts"], alpha: float) -> Float[Tensor, "*texts"]:
    """f(u) = (u − 1)² / 2 + u log u: f′ = u − 1 + log u, as in χPO (Huang et al. 2024, arXiv:2407.13399)."""
    return _expm1(log_ratio) + log_ratio


def _expm1(x: Float[Tensor, "*texts"]) -> Float[Tensor, "*texts"]:
    """e^x − 1, constant beyond `MAX_EXPONENT`."""
    return torch.expm1(x.clamp(max=MAX_EXPONENT))


# -- losses of a difference of f′ --------------------------------------------------------------------------------------


def sigmoid(difference: Float[Tensor, "pairs"], beta: float) -> Float[Tensor, "pairs"]:
    """−log σ(β d): the negative log-likelihood of the comparison under the model of Bradley and Terry."""
    return -F.logsigmoid(beta * difference)


def ipo(difference: Float[Tensor, "pairs"], beta: float) -> Float[Tensor, "pairs"]:
    """(d − 1/(2β))²: regression of the log-ratios, which has a finite optimum (Azar et al. 2023, arXiv:2310.12036)."""
    return (difference - 1 / (2 * beta)).square()


def hinge(difference: Float[Tensor, "pairs"], beta: float) -> Float[Tensor, "pairs"]:
    """max(0, 1 − β d), as in SLiC (Zhao et al. 2023, arXiv:2305.10425): no gradient once the margin is 1."""
    return (1 - beta * difference).clamp(min=0)


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss, the f′ of a divergence, and what else is made of a comparison.

    Attributes:
        function: The loss of a difference of f′ at a given β.
        reward: f′ as a function of log-ratio and `alpha`.
        beta: The weight of the divergence.
        alpha: Of the α-divergence.
        clip: β d is clipped to ± this, beyond which a comparison has no gradient (χPO: 2 R_max); None: not at all.
        flipped: The probability ε that a label is the wrong way round. The loss is (1 − ε) L(d) + ε L(−d), as in
            conservative DPO (Mitchell 2023).
        unbiased: Take ((1 − ε) L(d) − ε L(−d)) / (1 − 2ε) instead, which over flipped labels is in expectation the loss
            of the right ones (Chowdhury et al. 2024, arXiv:2403.00409).
    """

    function: Callable[[Tensor, float], Tensor]
    reward: Callable[[Tensor, float], Tensor]
    beta: float
    alpha: float = 0.5
    clip: float | None = None
    flipped: float = 0.0
    unbiased: bool = False

    def rewards(self, log_ratios: Float[Tensor, "*texts"]) -> Float[Tensor, "*texts"]:
        """β f′: the reward that the policy is optimal for, 0 at the reference."""
        return self.beta * self.reward(log_ratios, self.alpha)

    def __call__(self, chosen: Float[Tensor, "pairs"], rejected: Float[Tensor, "pairs"]) -> Float[Tensor, "pairs"]:
        """The loss of each comparison, from the log-ratios log π / π_ref of its answers in nats."""
        difference = self.reward(chosen, self.alpha) - self.reward(rejected, self.alpha)
        if self.clip is not None:
            difference = difference.clamp(-self.clip / self.beta, self.clip / self.beta)
        loss = self.function(difference, self.beta)
        if not self.flipped:
            return loss
        other = self.flipped * self.function(-difference, self.beta)
        if self.unbiased:
            return ((1 - self.flipped) * loss - other) / (1 - 2 * self.flipped)
        return (1 - self.flipped) * loss + other
