"""The guards that compare one metric with a limit: when each of them fires, and its message."""

import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from rlhf.guards.base import Detector, Metrics
from rlhf.settings import LimitGuard


@dataclass(frozen=True)
class ThresholdRule:
    """When one metric counts as wrong, and how to say so.

    Attributes:
        metric: The name of the metric.
        is_exceeded: Whether the metric is beyond its limit, given the detector with the metric's values.
        message: A format string with the fields `start`, `now`, `limit` and `window` of the detector.
        advice: The usual cause and what to try (`Detector`).
    """

    metric: str
    is_exceeded: Callable[["ThresholdDetector"], bool]
    message: str
    advice: str


class ThresholdDetector(Detector):
    """Compares one metric with its limit, by the means of its first and of its last `window` finite values."""

    def __init__(self, options: LimitGuard, rule: ThresholdRule):
        super().__init__(options)
        self.limit, self.rule, self.advice = options.limit, rule, rule.advice
        self.first: list[float] = []
        self.recent: deque[float] = deque(maxlen=self.window)

    def update(self, step: int, metrics: Metrics) -> str | None:
        """Add the metric's value and apply the rule once there are `window` of them.

        Non-finite values are ignored here, because the guard `non_finite` reports them.
        """
        value = metrics.get(self.rule.metric)
        if value is None or not math.isfinite(value):
            return None
        if len(self.first) < self.window:
            self.first.append(value)
        self.recent.append(value)
        if len(self.recent) < self.window or not self.rule.is_exceeded(self):
            return None
        return self.rule.message.format(start=self.start, now=self.now, limit=self.limit, window=self.window)

    @property
    def start(self) -> float:
        """The mean of the first `window` values."""
        return statistics.fmean(self.first)

    @property
    def now(self) -> float:
        """The mean of the last `window` values."""
        return statistics.fmean(self.recent)


THRESHOLD_RULES = {
    # Averages |log ratio| and not the ratio itself: the mean ratio is 1 in expectation whatever the samples are from.
    "first_ratio": ThresholdRule(
        "ppo/first_log_ratio",
        lambda seen: seen.now > seen.limit,
        "before the step's first update, the old log-probs differed from the policy's by {now:.3f} nats per token on"
        " average (limit: {limit:g}), although they should be equal there",
        "usual cause: log-probs that were captured during sampling, in another precision or by another program than the"
        " update's; try generation.capture_logprobs=auto, which recomputes them unless they are exact, and check"
        " whether ppo/sampling_gap stays high",
    ),
    "sampling_gap": ThresholdRule(
        "ppo/sampling_gap",
        lambda seen: seen.now > seen.limit,
        "the generation engine's log-probs of the sampled tokens differed from the policy's by {now:.3f} nats per token"
        " on average (limit: {limit:g})",
        "usual cause: an engine that samples from another distribution than the policy (a top-k or top-p filter, a"
        " temperature, an ignored attention mask, old weights), which recomputing log-probs does not repair; try"
        " generation.engine=transformers to rule out the engine, or model.dtype=float32 to rule out rounding",
    ),
    "negative_kl": ThresholdRule(
        "ppo/k1",
        lambda seen: seen.now < -seen.limit,
        "the k1 estimate of the KL from the reference averaged {now:.3f} nats per token (limit: -{limit:g}), although a"
        " KL cannot be negative",
        "usual cause: responses that were not sampled from the plain policy (top-k, top-p, a minimum length, another"
        " temperature); try generation.engine=native",
    ),
    "large_kl": ThresholdRule(
        "ppo/k1",
        lambda seen: seen.now > seen.limit,
        "the KL from the reference averaged {now:.2f} nats per token (limit: {limit:g})",
        "usual cause: a penalty that is too weak or a learning rate that is too large; try {nearer} or a smaller {lr}",
    ),
    "repetition": ThresholdRule(
        "ppo/repetition",
        lambda seen: seen.now - seen.start > seen.limit,
        "the share of repeated 4-grams in the responses rose from {start:.2f} to {now:.2f}"
        " (limit: a rise of {limit:g})",
        "usual cause: a reward that grows with repetition; try {nearer}, and read the texts in samples.jsonl",
    ),
    "length_cap": ThresholdRule(
        "ppo/missing_eos",
        lambda seen: seen.now - seen.start > seen.limit,
        "the share of responses that were cut off at generation.max_new_tokens rose from {start:.2f} to {now:.2f}"
        " (limit: a rise of {limit:g})",
        "usual cause: a reward that grows with length; try a larger ppo.missing_eos_penalty, or a"
        " larger generation.max_new_tokens",
    ),
    "mute": ThresholdRule(
        "eval/response_tokens",
        lambda seen: seen.now <= seen.limit,
        "the answers to the evaluation prompts had {now:.1f} tokens on average (limit: {limit:g})",
        "usual cause: an SFT model that has learnt to end at once, from demonstrations whose responses are empty or cut"
        " off, or from too few steps; try more sft.epochs, read rendered.txt beside the SFT model and samples.jsonl,"
        " or set guards.mute.action=off if answers shall be so short",
    ),
    "entropy_collapse": ThresholdRule(
        "ppo/entropy",
        lambda seen: seen.now < seen.limit * seen.start,
        "the policy's entropy fell from {start:.3f} to {now:.3f} nats per token (limit: {limit:g} times its start)",
        "usual cause: a learning rate that is too large or a penalty that is too weak; try a smaller {lr} or {nearer}",
    ),
    "entropy_rise": ThresholdRule(
        "ppo/entropy",
        lambda seen: seen.now > seen.limit * seen.start,
        "the policy's entropy rose from {start:.3f} to {now:.3f} nats per token (limit: {limit:g} times its start)",
        "usual cause: over-optimisation under a penalty that is too weak; try {nearer} or fewer {group}.steps",
    ),
    # The largest of the recent values and not their mean, because a single bad step is common.
    "explained_variance": ThresholdRule(
        "ppo/explained_variance",
        lambda seen: max(seen.recent) < seen.limit,
        "the value function's explained variance averaged {now:.3f} over {window} steps and was below {limit:g} at each"
        " of them",
        "usual cause: a value function that lags behind the policy; try a larger ppo.value_coef or a smaller {lr}",
    ),
}
