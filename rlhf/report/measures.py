"""What the metrics are called, and in which units people read them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """A metric for readers: `scale` times its value, with `digits` decimals."""

    name: str
    unit: str = ""
    scale: float = 1.0
    digits: int = 2

    @property
    def title(self) -> str:
        """Name and unit."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    @property
    def points(self) -> str:
        """The unit of a difference: per cents differ by points."""
        return "points" if self.unit == "%" else self.unit


MEASURES = {
    "eval/win_rate": Measure("win rate", "%", 100, 1),
    "eval/length_adjusted_win_rate": Measure("length-adjusted win rate", "%", 100, 1),
    "eval/length_controlled_win_rate": Measure("length-controlled win rate", "%", 100, 1),
    "eval/true_kl": Measure("true KL", "nats per token", digits=3),
    "eval/response_tokens": Measure("response length", "tokens", digits=1),
    "eval/factual_precision": Measure("factual precision", "%", 100, 1),
    "eval/facts_per_response": Measure("facts per response"),
    "eval/factscore": Measure("FActScore", "%", 100, 1),
    "eval/responding_ratio": Measure("responses with facts", "%", 100, 1),
    "eval/reward": Measure("learned reward"),
    "eval/gold_utility": Measure("gold utility"),
    "step": Measure("PPO step"),
    "ppo/k1": Measure("k1 estimate of the KL", "nats per token", digits=3),
    "ppo/k3": Measure("k3 estimate of the KL", "nats per token", digits=3),
    "ppo/response_tokens": Measure("sampled response length", "tokens", digits=1),
    "ppo/missing_eos": Measure("responses without an end", "%", 100, 1),
}
COLUMNS = [name for name in MEASURES if name.startswith("eval/")]


def measure(metric: str) -> Measure:
    """The metric's words; one that is not known keeps its own name."""
    return MEASURES.get(metric) or Measure(metric.partition("/")[2].replace("_", " ") or metric, digits=3)
