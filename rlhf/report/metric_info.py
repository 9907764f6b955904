"""The display name, unit, scale, number of decimals and direction of every metric that a report can show."""

from dataclasses import dataclass
from typing import Literal

Direction = Literal["↑", "↓", ""]  # higher is better, lower is better, or neither


@dataclass(frozen=True)
class MetricInfo:
    """How a metric is displayed: `scale` times its value, in `unit`, with `digits` decimals.

    `better` is empty where neither direction is good in itself: a distance, a length, the reward that training raises.
    """

    name: str
    unit: str = ""
    scale: float = 1.0
    digits: int = 2
    better: Direction = ""

    @property
    def title(self) -> str:
        """Name and unit, for table headers and axes."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    @property
    def points(self) -> str:
        """The unit of a difference between two values: percentages differ by points."""
        return "points" if self.unit == "%" else self.unit


KNOWN_METRICS = {
    "eval/win_rate": MetricInfo("win rate", "%", 100, 1, better="↑"),
    "eval/length_adjusted_win_rate": MetricInfo("length-adjusted win rate", "%", 100, 1, better="↑"),
    "eval/length_controlled_win_rate": MetricInfo("length-controlled win rate", "%", 100, 1, better="↑"),
    "eval/true_kl": MetricInfo("true KL", "nats per token", digits=3),
    "eval/response_tokens": MetricInfo("response length", "tokens", digits=1),
    "eval/factual_precision": MetricInfo("factual precision", "%", 100, 1, better="↑"),
    "eval/factual_precision_famous": MetricInfo("precision about the famous third", "%", 100, 1, better="↑"),
    "eval/factual_precision_known": MetricInfo("precision about the next third", "%", 100, 1, better="↑"),
    "eval/factual_precision_obscure": MetricInfo("precision about the last third", "%", 100, 1, better="↑"),
    "eval/facts_per_response": MetricInfo("facts per response"),
    "eval/factscore": MetricInfo("FActScore", "%", 100, 1, better="↑"),
    "eval/responding_ratio": MetricInfo("responses with facts", "%", 100, 1),
    "eval/distinct_2": MetricInfo("distinct word pairs"),
    "eval/reward": MetricInfo("reward"),
    "eval/gold_utility": MetricInfo("gold utility", better="↑"),
    "step": MetricInfo("PPO step"),
    "ppo/k1": MetricInfo("k1 estimate of the KL", "nats per token", digits=3),
    "ppo/k3": MetricInfo("k3 estimate of the KL", "nats per token", digits=3),
    "ppo/response_tokens": MetricInfo("sampled response length", "tokens", digits=1),
    "ppo/missing_eos": MetricInfo("responses without an end", "%", 100, 1, better="↓"),
}
# what training by a reward costs, for layouts that ask for it
COSTS = {
    "eval/forward_kl": MetricInfo("forward KL", "nats per token", digits=3),
    "eval/entropy": MetricInfo("entropy of answers", "nats per token", digits=3),
    "eval/demonstration_perplexity": MetricInfo("perplexity of held-out demonstrations", better="↓"),
    "eval/text_perplexity": MetricInfo("perplexity of other texts", better="↓"),
    "eval/facts_known": MetricInfo("facts known", "%", 100, 1, better="↑"),
    "eval/facts_lost": MetricInfo("facts forgotten", "%", 100, 1, better="↓"),
    "eval/samples_distinct_1": MetricInfo("distinct tokens of several answers"),
    "eval/samples_distinct_2": MetricInfo("distinct token pairs of several answers"),
    "eval/samples_ead": MetricInfo("distinct tokens of several answers, adjusted"),
    "eval/samples_unlike": MetricInfo("different answers among several", "%", 100, 1),
}
COLUMNS = [name for name in KNOWN_METRICS if name.startswith("eval/")]  # of a table whose layout names none
EVAL_METRICS = [*COLUMNS, *COSTS]  # what a search may have as objectives


def metric_info(metric: str) -> MetricInfo:
    """How a metric is displayed; an unknown metric gets the part of its key after the slash as its name."""
    return (
        KNOWN_METRICS.get(metric)
        or COSTS.get(metric)
        or MetricInfo(metric.partition("/")[2].replace("_", " ") or metric, digits=3)
    )
