"""How strongly each estimator pulls the policy back to the reference: by enumeration, on a toy policy.

PPO treats a penalty d on the sampled token as a reward. It therefore follows E[d ∇log π] and omits the second part of
∇E[d], which is E[∇d]. For k1 that part is 0, and E[δ ∇log π] is the gradient of KL(π ‖ π_ref). For every other
estimator it is not, however well its *value* estimates the KL (Tang & Munos 2025, arXiv 2506.09477; Liu et al. 2025,
arXiv 2510.01555; Shah et al. 2025, arXiv 2512.21852). A term of the loss follows the second part alone, and with an
importance weight the whole (`rlhf.placement`). `python -m rlhf.restoring_pull` prints the tables of
docs/divergences.md.
"""

from collections.abc import Callable, Mapping
from functools import cache

import torch
from jaxtyping import Float
from scipy.optimize import brentq  # type: ignore[import-untyped]
from torch import Tensor

from rlhf import divergence, f_divergence

Estimator = Callable[[Tensor, Tensor], Tensor]
ESTIMATORS: dict[str, Estimator] = {
    "kl": divergence.kl,
    "clamped_kl": divergence.clamped_kl,
    "squared_error": divergence.squared_error,
    "bregman": divergence.bregman,
    "jensen_shannon": divergence.jensen_shannon,
}
FAMILY: dict[str, Estimator] = {
    "forward_kl": f_divergence.forward_kl,
    "alpha": f_divergence.alpha_divergence,
    "chi_squared": f_divergence.chi_squared,
    "renyi": f_divergence.renyi,
    "total_variation": f_divergence.total_variation,
    "hellinger": f_divergence.hellinger,
}
DISTANCES = (0.003, 0.01, 0.03, 0.1, 0.3, 0.49, 1.0)  # nats per token
STATES, VOCABULARY = 500, 50

Parts = tuple[Tensor, Tensor, Tensor]


def gradients(
    estimator: Estimator, logits: Float[Tensor, "states vocabulary"], ref_logits: Float[Tensor, "states vocabulary"]
) -> Parts:
    """Gradients in the logits: E[d ∇log π] (of the reward), E[∇d] (which it omits), and that of KL(π ‖ π_ref)."""
    logits = logits.detach().requires_grad_()
    logprobs, ref_logprobs = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    probs, penalty = logprobs.detach().exp(), estimator(logprobs, ref_logprobs)

    def gradient(x: Tensor) -> Tensor:
        # adding 0 · logits gives a gradient of 0 to an estimator that does not depend on the logits
        return torch.autograd.grad(x.sum(-1).mean() + 0 * logits.sum(), logits, retain_graph=True)[0]

    rewarded, omitted = gradient(probs * penalty.detach() * logprobs), gradient(probs * penalty)
    return rewarded, omitted, gradient(probs * (logprobs - ref_logprobs).detach() * logprobs)


def restoring_pull(
    estimator: Estimator,
    logits: Float[Tensor, "states vocabulary"],
    ref_logits: Float[Tensor, "states vocabulary"],
    part: str = "reward",
) -> float:
    """A gradient projected on that of the KL, in units of the latter: 1 for k1 as a reward, < 0 if it pushes away.

    `part` is the gradient of a `reward`, of a `loss`, or the `whole` of ∇E[d], as of a loss with an importance weight.
    """
    rewarded, omitted, true = gradients(estimator, logits, ref_logits)
    followed = {"reward": rewarded, "loss": omitted, "whole": rewarded + omitted}[part]
    return float((followed * true).sum() / true.square().sum())


def omitted_share(
    estimator: Estimator, logits: Float[Tensor, "states vocabulary"], ref_logits: Float[Tensor, "states vocabulary"]
) -> float:
    """The norm of E[∇d], which a reward omits, divided by that of the whole gradient ∇E[d]."""
    rewarded, omitted, _ = gradients(estimator, logits, ref_logits)
    return float(omitted.norm() / (rewarded + omitted).norm())


@cache
def toy(distance: float) -> tuple[Float[Tensor, "states vocabulary"], Float[Tensor, "states vocabulary"]]:
    """Logits of a policy and a reference whose mean KL is `distance` nats.

    The reference is drawn from a normal distribution, and so is the direction in which the policy moves away from it.
    """
    generator = torch.Generator().manual_seed(0)
    reference, direction = torch.randn(2, STATES, VOCABULARY, generator=generator, dtype=torch.float64)
    ref_logprobs = reference.log_softmax(-1)

    def excess(length: float) -> float:
        logprobs = (reference + length * direction).log_softmax(-1)
        return float((logprobs.exp() * (logprobs - ref_logprobs)).sum(-1).mean()) - distance

    return reference + brentq(excess, 0.0, 16.0) * direction, reference


def pulls(estimators: Mapping[str, Estimator] = ESTIMATORS, part: str = "reward") -> dict[str, list[float]]:
    """The pull of each estimator at each of `DISTANCES`, on the toy policy."""
    toys = [toy(distance) for distance in DISTANCES]
    return {name: [restoring_pull(own, *pair, part) for pair in toys] for name, own in estimators.items()}


def table(estimators: Mapping[str, Estimator] = ESTIMATORS, part: str = "reward") -> str:
    """A Markdown table of the pulls, and of the share of its gradient that a reward omits, nearest and farthest."""
    ends = [toy(distance) for distance in (DISTANCES[0], DISTANCES[-1])]
    last, columns = (" | omitted |", len(DISTANCES) + 1) if part == "reward" else (" |", len(DISTANCES))
    lines = [
        "| estimator | " + " | ".join(f"{distance:g}" for distance in DISTANCES) + last,
        "| --- |" + " ---: |" * columns,
    ]
    for name, numbers in pulls(estimators, part).items():
        cells = [f"{number:.2f}".replace("-0.00", "0.00").replace("-", "−") for number in numbers]
        if part == "reward":
            shares = [f"{100 * omitted_share(estimators[name], *pair):.0f}" for pair in ends]
            cells.append(f"{' to '.join(dict.fromkeys(shares))} %")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """The tables of docs/divergences.md, by what they show."""
    both = {**ESTIMATORS, **FAMILY}
    return {
        "as a reward": table(),
        "other divergences as a reward": table(FAMILY),
        "in the loss": table(both, "loss"),
        "in the loss with an importance weight, or in both": table(both, "whole"),
    }


if __name__ == "__main__":
    for shown, text in tables().items():
        print(f"{shown}:\n\n{text}\n")
