"""The mathematics of PPO as pure functions of [batch, time] tensors.

`mask` is true for the sampled response tokens and false for padding. Every mean is over the mask; a mean over nothing
raises an error, because a NaN would only surface later. `all_reduce` sums a tensor over the processes that share the
batch (`rlhf.distributed.collectives.all_reduce_sum`); by default there is one process.

Sources: Schulman et al. 2017 (PPO), Schulman et al. 2016 (GAE), Stiennon et al. 2020 and Sun, Gupta & Iyyer 2023 (the
shaping of the reward).
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]


def no_reduction(x: Tensor) -> Tensor:
    """The sum over a single process."""
    return x


def masked_mean(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], all_reduce: AllReduce = no_reduction
) -> Float[Tensor, ""]:
    """Mean of `x` over the mask.

    Raises:
        ValueError: the mask is empty.
    """
    count = all_reduce(mask.sum())
    if count == 0:
        raise ValueError("a masked mean over no tokens: the batch holds no response token")
    return all_reduce(torch.where(mask, x, 0.0).sum()) / count


def whiten(
    x: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    keep_mean: bool = False,
    all_reduce: AllReduce = no_reduction,
) -> Float[Tensor, "*shape"]:
    """Scale to unit variance over the mask, and to mean 0 unless `keep_mean`; 0 off the mask.

    The variance is that of the population (divided by n). `keep_mean=True` is what the published code applies to
    rewards; it adds a term in the length of a response (`whitening_length_term`).

    Raises:
        ValueError: the mask is empty.
    """
    mean = masked_mean(x, mask, all_reduce)
    whitened = torch.where(mask, x - mean, 0.0) * whitening_scale(x, mask, all_reduce)
    return torch.where(mask, whitened + mean, 0.0) if keep_mean else whitened


def whitening_scale(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], all_reduce: AllReduce = no_reduction
) -> Float[Tensor, ""]:
    """The factor of `whiten`: 1 / standard deviation over the mask."""
    centred = torch.where(mask, x - masked_mean(x, mask, all_reduce), 0.0)
    return torch.rsqrt(masked_mean(centred.square(), mask, all_reduce) + 1e-8)


def whitening_length_term(
    rewards: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], all_reduce: AllReduce = no_reduction
) -> Float[Tensor, ""]:
    """The reward of one standard deviation of response length under `whiten(keep_mean=True)`, in units of the rewards.

    With mean m and standard deviation s per token, a whitened reward is (r − m) / s + m = r / s + m (1 − 1/s), so that
    a response of L tokens gets its own sum / s, and in addition L · m (1 − 1/s): L · m (s − 1) in units of the rewards.
    Rewards per token are mostly near 0 and s is below 1, so the term has the sign *opposite* to the mean reward: a
    positive mean pays for short responses, a negative one for long responses.
    """
    lengths = mask.sum(1).to(rewards)
    every = torch.ones_like(lengths, dtype=torch.bool)
    spread = 1 / whitening_scale(lengths, every, all_reduce)
    return spread * masked_mean(rewards, mask, all_reduce) * (1 / whitening_scale(rewards, mask, all_reduce) - 1)


def shape_rewards(
    scores: Float[Tensor, "batch"],
    penalty: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    coef: float,
    given: Float[Tensor, "batch time"] | None = None,
) -> Float[Tensor, "batch time"]:
    """Reward per token: −β · d everywhere, plus the score on the last sampled token (the EOS when one was sampled).

    `given` are rewards per token that are part of the score, 0 on padding: they stay where they are, and only what the
    score has beside their sum is put on the last token.

    Raises:
        ValueError: a row has no response token to carry its score.
    """
    lengths = mask.sum(1)
    if bool((lengths == 0).any()):
        raise ValueError("a rollout without any response token cannot be given its score")
    rewards = torch.where(mask, -coef * penalty, 0.0)
    if given is not None:
        rewards, scores = rewards + given, scores - given.sum(1)
    return rewards.scatter_add(1, (lengths - 1)[:, None], scores[:, None].to(rewards))


def gae(
    rewards: Float[Tensor, "batch time"],
    values: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    gamma: float,
    lam: float,
) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time"]]:
    """Generalised advantage estimation (Schulman et al. 2016, equation 16): (advantages, returns), 0 off the mask.

    values[:, t] is the value of the state in which token t was chosen. In each row the mask
    must be true up to some position and false after it. The value after the last token is 0: the episode ends there.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    deltas = rewards + gamma * following - values
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        running = torch.where(mask[:, t], deltas[:, t] + gamma * lam * running, 0.0)
        advantages[:, t] = running
    return advantages, advantages + values


def policy_losses(
    logprobs: Float[Tensor, "*shape"],
    old_logprobs: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*shape"],
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
) -> Float[Tensor, "*shape"]:
    """The clipped surrogate (Schulman et al. 2017, equation 7), negated: max(−A r, −A clip(r, 1 − low, 1 + high)).

    `clip_range` is low, and high too unless `clip_range_high` is given (clip-higher: Yu et al. 2025). With
    `dual_clip` = c > 1, the loss of a negative advantage is at most −A c (Ye et al. 2020), however much
    likelier the token has become. Per token, without padding; the caller takes the mean over a minibatch, whose
    gradients it accumulates.
    """
    ratio = (logprobs - old_logprobs).exp()
    high = clip_range if clip_range_high is None else clip_range_high
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + high))
    if dual_clip is None:
        return losses
    return torch.where(advantages < 0, torch.minimum(losses, -advantages * dual_clip), losses)


def value_losses(
    values: Float[Tensor, "*shape"],
    old_values: Float[Tensor, "*shape"],
    returns: Float[Tensor, "*shape"],
    clip_range: float | None,
) -> Float[Tensor, "*shape"]:
    """½ max((V − R)², (clip(V, V_old ± clip_range) − R)²) per token, without padding; None: ½ (V − R)²."""
    if clip_range is None:
        return (values - returns).square() / 2
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2


def explained_variance(
    values: Float[Tensor, "batch time"],
    returns: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    all_reduce: AllReduce = no_reduction,
) -> Float[Tensor, ""]:
    """1 − Var(R − V) / Var(R) over the mask: 1 is a perfect value function, 0 no better than a constant."""

    def variance(x: Tensor) -> Tensor:
        x, kept = x[mask], mask[mask]
        return masked_mean((x - masked_mean(x, kept, all_reduce)).square(), kept, all_reduce)

    return 1 - variance(returns - values) / variance(returns).clamp(min=1e-8)


class ScoreNormalizer:
    """Normalises scores by their running moments, then clips them to ±`clip` (None: no clipping).

    `none` does nothing, `scale` divides by the running standard deviation, `standardize` also subtracts the running
    mean (TRL's `use_score_scaling` and `use_score_norm`). The moments are those of all finite scores so far, including
    the present ones.
    """

    def __init__(self, kind: str, clip: float | None, all_reduce: AllReduce = no_reduction):
        self.kind, self.clip, self.all_reduce = kind, clip, all_reduce
        self.count, self.mean, self.squares = 0.0, 0.0, 0.0

    def __call__(self, scores: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
        """Update the moments with these scores; return the normalised scores."""
        if self.kind != "none":
            self._update_moments(scores.double())
        return self.normalized(scores)

    def normalized(self, scores: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
        """The scores by the moments so far, which stay as they are."""
        if self.kind != "none":
            std = max((self.squares / max(self.count, 1.0)) ** 0.5, 1e-8)
            scores = (scores - (self.mean if self.kind == "standardize" else 0.0)) / std
        return scores if self.clip is None else scores.clamp(-self.clip, self.clip)

    def _update_moments(self, scores: Tensor) -> None:
        scores = scores[scores.isfinite()]  # a single NaN would spoil the moments for the rest of the run
        number, summed = self.all_reduce(torch.stack([scores.new_tensor(float(len(scores))), scores.sum()])).tolist()
        if not number:
            return
        # Chan et al. 1983: the sums of squares of two samples from their own means
        mean = summed / number
        count, gap = self.count + number, mean - self.mean
        self.squares += float(self.all_reduce((scores - mean).square().sum())) + gap**2 * self.count * number / count
        self.mean += gap * number / count
        self.count = count

    def state_dict(self) -> dict[str, float]:
        """The moments, for a checkpoint."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from the moments of a checkpoint."""
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]


class FixedKL:
    """A constant penalty coefficient (`kl=fixed`). `rlhf.placement` reads where the penalty acts."""

    def __init__(self, coef: float, placement: str = "auto", importance_weight: bool = False):
        if not 0 <= coef < math.inf:
            raise ValueError(
                f"kl.coef={coef} is not allowed; allowed: a number of 0 or above; to reward distance, "
                "use divergence=negative_kl"
            )
        self.coef, self.placement, self.importance_weight = coef, placement, importance_weight

    def update(self, kl: float) -> None:
        """Do nothing: the coefficient is fixed."""


class AdaptiveKL:
    """Ziegler et al. 2019, section 2.2: the coefficient follows the measured KL (`kl=adaptive`).

    coef ← coef · (1 + k_beta · clip(KL / target − 1, ±0.2)), with KL summed over a response (nats).
    """

    def __init__(
        self, coef: float, target: float, k_beta: float, placement: str = "auto", importance_weight: bool = False
    ):
        if not all(0 < number < math.inf for number in (coef, target, k_beta)):
            raise ValueError(f"kl.coef={coef}, kl.target={target}, kl.k_beta={k_beta}; allowed: numbers above 0")
        self.coef, self.target, self.k_beta = coef, target, k_beta
        self.placement, self.importance_weight = placement, importance_weight

    def update(self, kl: float) -> None:
        """Adapt the coefficient to the mean KL per response of a rollout batch (k1, in nats)."""
        self.coef *= 1 + self.k_beta * min(max(kl / self.target - 1, -0.2), 0.2)
