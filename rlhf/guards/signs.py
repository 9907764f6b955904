"""What can be seen to go wrong: each guard is a fold over the logged lines of a run.

It sees one line after the other and says what is wrong in words, or nothing. `conf/guards/default.yaml` says of each
what it sees and what the usual cause is.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rlhf.settings import GuardSettings, LimitGuard

SKIPPED = "guard/skipped_updates"  # of a step: the optimiser steps that were not made
Metrics = Mapping[str, float]


class Guard:
    """Sees every logged line; `advice` names the usual cause and what to try."""

    advice: str

    def __init__(self, options: GuardSettings):
        self.window = options.window

    def see(self, step: int, metrics: Metrics) -> str | None:
        """What is wrong now, in words, or None."""
        raise NotImplementedError


class NonFinite(Guard):
    """Updates that were skipped because their loss, gradient or reward is no number."""

    advice = (
        "usual cause: a reward function that fails on some texts, or too large a learning rate; try to load the batch"
        " saved in inspect/, or a smaller lr"
    )

    def __init__(self, options: GuardSettings):
        super().__init__(options)
        self.row, self.last = 0, -1

    def see(self, step: int, metrics: Metrics) -> str | None:
        """Steps in a row are counted by their numbers: a supervised stage does not log every step."""
        if not metrics.get(SKIPPED):
            return None
        self.row = self.row + 1 if step == self.last + 1 else 1
        self.last = step
        what = "loss or gradient" if math.isfinite(metrics.get("ppo/reward", 0.0)) else "reward"
        return f"a {what} was no finite number, updates were skipped in {self.row} steps in a row"

    @property
    def exhausted(self) -> bool:
        """Whether it happened in so many steps in a row that going on is of no use."""
        return self.row >= self.window


@dataclass(frozen=True)
class Sign:
    """What can be wrong about a metric: when, in what words (of `start` and `now`), the usual cause and what to try."""

    key: str
    wrong: Callable[["Watch"], bool]
    what: str
    advice: str


class Watch(Guard):
    """One metric against its limit: the means of its first and of its last `over` finite values."""

    def __init__(self, options: LimitGuard, sign: Sign):
        super().__init__(options)
        self.limit, self.sign, self.advice = options.limit, sign, sign.advice
        self.first: list[float] = []
        self.recent: deque[float] = deque(maxlen=self.window)

    def see(self, step: int, metrics: Metrics) -> str | None:
        """Judge the newest values once there are enough; what is not finite is left to `NonFinite`."""
        value = metrics.get(self.sign.key)
        if value is None or not math.isfinite(value):
            return None
        if len(self.first) < self.window:
            self.first.append(value)
        self.recent.append(value)
        if len(self.recent) < self.window or not self.sign.wrong(self):
            return None
        return self.sign.what.format(now=self.now, start=self.start)

    @property
    def start(self) -> float:
        """The mean of the first values."""
        return statistics.fmean(self.first)

    @property
    def now(self) -> float:
        """The mean of the last values."""
        return statistics.fmean(self.recent)


SIGNS = {
    "first_ratio": Sign(
        "ppo/first_log_ratio",
        lambda watch: watch.now > watch.limit,
        "the ratio before the first update was a factor of exp(±{now:.3f}) from 1 in the mean, and should be 1",
        "usual cause: old log-probs captured in another precision or by another program than the update's; try"
        " generation.capture_logprobs=auto, which scores them again, and look at ppo/sampling_gap, which that leaves",
    ),
    "sampling_gap": Sign(
        "ppo/sampling_gap",
        lambda watch: watch.now > watch.limit,
        "the log-probs that tokens were sampled with were {now:.3f} nats away from those of the model in the mean",
        "usual cause: an engine that samples from another distribution than the model's (a filter, a temperature, a"
        " mask of attention that it leaves out, old weights), which scoring again does not mend;"
        " try generation.engine=transformers, or model.dtype=float32 to tell it from rounding",
    ),
    "negative_kl": Sign(
        "ppo/k1",
        lambda watch: watch.now < -watch.limit,
        "the mean k1 estimate of the KL from the reference was {now:.3f} nats per token, and no KL is negative",
        "usual cause: responses not sampled from the plain policy (top-k, top-p, minimum length, another temperature);"
        " try generation.engine=native",
    ),
    "large_kl": Sign(
        "ppo/k1",
        lambda watch: watch.now > watch.limit,
        "the KL from the reference was {now:.2f} nats per token",
        "usual cause: too weak a penalty or too large a learning rate; try a larger kl.coef or a smaller ppo.lr",
    ),
    "repetition": Sign(
        "ppo/repetition",
        lambda watch: watch.now - watch.start > watch.limit,
        "the share of repeated 4-grams in the responses rose from {start:.2f} to {now:.2f}",
        "usual cause: a reward that grows with repetition; try a larger kl.coef, and read samples.jsonl",
    ),
    "length_cap": Sign(
        "ppo/missing_eos",
        lambda watch: watch.now - watch.start > watch.limit,
        "the share of responses cut off at generation.max_new_tokens rose from {start:.2f} to {now:.2f}",
        "usual cause: a reward that grows with length; try ppo.missing_eos_penalty or more generation.max_new_tokens",
    ),
    "entropy_collapse": Sign(
        "ppo/entropy",
        lambda watch: watch.now < watch.limit * watch.start,
        "the policy's entropy fell from {start:.3f} to {now:.3f} nats per token",
        "usual cause: too large a learning rate or too weak a penalty; try a smaller ppo.lr or a larger kl.coef",
    ),
    "entropy_rise": Sign(
        "ppo/entropy",
        lambda watch: watch.now > watch.limit * watch.start,
        "the policy's entropy rose from {start:.3f} to {now:.3f} nats per token",
        "usual cause: over-optimisation under too weak a penalty; try a larger kl.coef or fewer ppo.steps",
    ),
    "explained_variance": Sign(
        "ppo/explained_variance",
        lambda watch: max(watch.recent) < watch.limit,  # all of them, not their mean: one bad step is common
        "the value function's explained variance was {now:.3f} on average and at no step above its limit",
        "usual cause: a value function that lags behind; try a larger ppo.value_coef or a smaller ppo.lr",
    ),
}


class Spike(Guard):
    """A loss or gradient norm far above the median of the values before it."""

    advice = "usual cause: too large a learning rate or an odd batch; try a smaller lr, or a smaller max_grad_norm"
    keys = tuple(
        f"{stage}/{name}"
        for stage, names in {
            "ppo": ("value_loss", "grad_norm"),
            "sft": ("loss", "grad_norm"),
            "reward": ("loss", "grad_norm"),
        }.items()
        for name in names
    )

    def __init__(self, options: LimitGuard):
        super().__init__(options)
        self.limit = options.limit
        self.recent = {key: deque[float](maxlen=self.window) for key in self.keys}

    def see(self, step: int, metrics: Metrics) -> str | None:
        """Compare first, then remember: a spike is no part of what it is compared with."""
        found = []
        for key in self.keys:
            value, recent = metrics.get(key), self.recent[key]
            if value is None or not math.isfinite(value):
                continue
            usual = statistics.median(recent) if len(recent) == self.window else math.inf
            if value > self.limit * usual > 0:
                found.append(f"{key} jumped to {value:.3g} from a median of {usual:.3g}")
            recent.append(value)
        return " and ".join(found) or None


class Overoptimization(Guard):
    """The learned reward rises while the truth falls (Gao, Schulman & Hilton 2023)."""

    advice = "usual cause: the policy exploits the reward model; try fewer ppo.steps or a larger kl.coef"
    truths = {"eval/gold_utility": "gold utility", "eval/win_rate": "win rate"}  # noqa: RUF012

    def __init__(self, options: LimitGuard):
        super().__init__(options)
        self.limit = options.limit
        self.best: dict[str, tuple[float, float, float]] = {}
        self.row = 0

    def see(self, step: int, metrics: Metrics) -> str | None:
        """At an evaluation: each truth against its own best so far, in standard errors of their difference.

        Of the paired one (`rlhf.stages.evaluation.falls`), since both are on the same prompts. Lines of older runs have
        none: taking the two for independent then mostly asks for too large a fall.
        """
        reward = metrics.get("eval/reward")
        if reward is None:
            return None
        found = []
        for key, name in self.truths.items():
            value, error = metrics.get(key), metrics.get(f"{key}_se")
            if value is None or error is None:
                continue
            best, its_error, its_reward = self.best.setdefault(key, (value, error, reward))
            fall = metrics.get(f"{key}_fall", best - value)
            its = metrics.get(f"{key}_fall_se", math.hypot(error, its_error))
            if fall > self.limit * its and reward >= its_reward:
                found.append(
                    f"the {name} fell from {best:.2f} to {value:.2f} while the learned reward went from"
                    f" {its_reward:.2f} to {reward:.2f}"
                )
            if value > best:
                self.best[key] = value, error, reward
        self.row = self.row + 1 if found else 0
        return found[0] if self.row >= self.window else None


class LinearRange(Guard):
    """At first the learned reward grows in proportion to √KL (Bai et al. 2022); later each √nat buys less."""

    advice = "usual cause: what the reward model can tell is used up; try fewer ppo.steps or a larger kl.coef"
    from_kl = 0.01  # nats per token: nearer to the reference the slope is noise

    def __init__(self, options: LimitGuard):
        super().__init__(options)
        self.limit = options.limit
        self.begin: float | None = None
        self.slope: float | None = None
        self.row = 0

    def see(self, step: int, metrics: Metrics) -> str | None:
        """At an evaluation: what has been gained per √KL, against the first one that can be told."""
        reward, kl = metrics.get("eval/reward"), metrics.get("eval/true_kl")
        if reward is None or kl is None:
            return None
        if self.begin is None:
            self.begin = reward
        if kl < self.from_kl:
            return None
        slope = (reward - self.begin) / math.sqrt(kl)
        if self.slope is None:
            self.slope = slope
        self.row = self.row + 1 if slope < self.limit * self.slope else 0
        if self.row < self.window:
            return None
        return f"the learned reward gained {slope:.2f} per √KL (nats per token), and {self.slope:.2f} at first"


GUARDS: dict[str, Callable[[Any], Guard]] = {
    "non_finite": NonFinite,
    **{name: partial(Watch, sign=sign) for name, sign in SIGNS.items()},
    "overoptimization": Overoptimization,
    "linear_range": LinearRange,
    "spike": Spike,
}


def repetition(rows: Sequence[Sequence[Hashable]], n: int = 4) -> float:
    """Mean share of n-grams that repeat one before them in the same row (seq-rep-n of Welleck et al. 2020).

    Rows shorter than n tokens have none and count as 0.
    """
    shares = []
    for row in rows:
        grams = list(zip(*(row[i:] for i in range(n)), strict=False))
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return statistics.fmean(shares) if shares else 0.0
