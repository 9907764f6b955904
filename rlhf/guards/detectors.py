"""The detectors behind the guards.

Each reads the logged metrics line by line and reports what is wrong in words. `conf/guards/default.yaml` describes what
each guard detects and the usual cause.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from rlhf.guards.base import SKIPPED, Detector, Metrics
from rlhf.guards.thresholds import THRESHOLD_RULES, ThresholdDetector
from rlhf.settings import GuardSettings, LimitGuard


class NonFiniteDetector(Detector):
    """Detects updates that were skipped because the loss, the gradient or a reward was NaN or infinite."""

    advice = (
        "usual cause: a reward function that fails on some texts, or a learning rate that is too large; try loading the"
        " batch that was saved in inspect/ to find the text, or a smaller {lr}"
    )

    def __init__(self, options: GuardSettings):
        super().__init__(options)
        self.consecutive, self.last_step = 0, -1

    def update(self, step: int, metrics: Metrics) -> str | None:
        """Count consecutive steps with skipped updates.

        Step numbers decide what is consecutive, because a supervised stage does not log every step.
        """
        if not metrics.get(SKIPPED):
            return None
        self.consecutive = self.consecutive + 1 if step == self.last_step + 1 else 1
        self.last_step = step
        what = "the loss or the gradient" if math.isfinite(metrics.get("ppo/reward", 0.0)) else "a reward"
        steps = "this step" if self.consecutive == 1 else f"{self.consecutive} steps in a row"
        return f"{what} was NaN or infinite, so updates were skipped in {steps}"

    @property
    def must_stop(self) -> bool:
        """Whether updates were skipped in `window` consecutive steps, after which training is hopeless."""
        return self.consecutive >= self.window


class SpikeDetector(Detector):
    """Detects a loss or gradient norm far above the median of the values before it."""

    advice = (
        "usual cause: a learning rate that is too large, or an unusual batch; try a smaller {lr}, or a smaller"
        " {group}.max_grad_norm"
    )
    keys = tuple(
        f"{stage}/{name}"
        for stage, names in {
            "ppo": ("value_loss", "grad_norm"),
            "sft": ("loss", "grad_norm"),
            "reward": ("loss", "grad_norm"),
            "dpo": ("loss", "grad_norm"),
            "best_of_n": ("loss", "grad_norm"),
        }.items()
        for name in names
    )

    def __init__(self, options: LimitGuard):
        super().__init__(options)
        self.limit = options.limit
        self.recent = {key: deque[float](maxlen=self.window) for key in self.keys}

    def update(self, step: int, metrics: Metrics) -> str | None:
        """Compare each value with the median of the `window` values before it."""
        spikes = []
        for key in self.keys:
            value, recent = metrics.get(key), self.recent[key]
            if value is None or not math.isfinite(value):
                continue
            median = statistics.median(recent) if len(recent) == self.window else math.inf
            if value > self.limit * median > 0:
                spikes.append(
                    f"{key} jumped to {value:.3g} from a median of {median:.3g} (limit: {self.limit:g} times it)"
                )
            recent.append(value)  # only now: a spike must not raise the median it is compared with
        return " and ".join(spikes) or None


class OveroptimizationDetector(Detector):
    """Detects that gold utility or win rate falls while the learned reward does not.

    Source: Gao, Schulman & Hilton 2023, "Scaling laws for reward model overoptimization".
    """

    advice = "usual cause: a policy that exploits errors of the reward model; try fewer {group}.steps or {nearer}"
    true_metrics = {"eval/gold_utility": "gold utility", "eval/win_rate": "win rate"}  # noqa: RUF012

    def __init__(self, options: LimitGuard):
        super().__init__(options)
        self.limit = options.limit
        self.best: dict[str, tuple[float, float, float]] = {}  # by metric: value, its standard error, learned reward
        self.consecutive = 0

    def update(self, step: int, metrics: Metrics) -> str | None:
        """Compare gold utility and win rate of an evaluation with their best so far, in standard errors of the fall.

        Both evaluations use the same prompts, so the standard error is the paired one (`<metric>_fall_se`, from
        `rlhf.stages.evaluation.falls`). Lines of older runs lack it. They are treated as independent samples, which
        overestimates the error and so mostly requires too large a fall.
        """
        reward = metrics.get("eval/reward")
        if reward is None:
            return None
        messages = []
        for key, name in self.true_metrics.items():
            value, error = metrics.get(key), metrics.get(f"{key}_se")
            if value is None or error is None:
                continue
            best, best_error, best_reward = self.best.setdefault(key, (value, error, reward))
            fall = metrics.get(f"{key}_fall", best - value)
            fall_error = metrics.get(f"{key}_fall_se", math.hypot(error, best_error))
            if fall > self.limit * fall_error and reward >= best_reward:
                messages.append(
                    f"the {name} fell from its best value of {best:.2f} to {value:.2f}, more than {self.limit:g}"
                    f" standard errors, while the reward went from {best_reward:.2f} to {reward:.2f}"
                )
            if value > best:
                self.best[key] = value, error, reward
        self.consecutive = self.consecutive + 1 if messages else 0
        return messages[0] if self.consecutive >= self.window else None


class LinearRangeDetector(Detector):
    """Detects that the learned reward no longer grows in proportion to √KL.

    At first it does; later each √nat buys less (Bai et al. 2022, "Training a helpful and harmless assistant with
    reinforcement learning from human feedback").
    """

    advice = (
        "usual cause: a policy that has used up what the reward model can distinguish; try fewer {group}.steps or"
        " {nearer}"
    )
    min_kl = 0.01  # nats per token; closer to the reference, the slope is mostly noise

    def __init__(self, options: LimitGuard):
        super().__init__(options)
        self.limit = options.limit
        self.start_reward: float | None = None
        self.start_slope: float | None = None
        self.consecutive = 0

    def update(self, step: int, metrics: Metrics) -> str | None:
        """Compare the reward gained per √KL at an evaluation with that of the first evaluation beyond `min_kl`."""
        reward, kl = metrics.get("eval/reward"), metrics.get("eval/true_kl")
        if reward is None or kl is None:
            return None
        if self.start_reward is None:
            self.start_reward = reward
        if kl < self.min_kl:
            return None
        slope = (reward - self.start_reward) / math.sqrt(kl)
        if self.start_slope is None:
            self.start_slope = slope
        # a policy that gained nothing at first has no range in which the reward rises with √KL, to be left
        left = self.start_slope > 0 and slope < self.limit * self.start_slope
        self.consecutive = self.consecutive + 1 if left else 0
        if self.consecutive < self.window:
            return None
        return (
            f"the reward gained {slope:.2f} per √KL (in nats per token), down from {self.start_slope:.2f} at"
            f" first (limit: {self.limit:g} times that)"
        )


DETECTORS: dict[str, Callable[[Any], Detector]] = {
    "non_finite": NonFiniteDetector,
    **{name: partial(ThresholdDetector, rule=rule) for name, rule in THRESHOLD_RULES.items()},
    "overoptimization": OveroptimizationDetector,
    "linear_range": LinearRangeDetector,
    "spike": SpikeDetector,
}
