"""Pairs of answers with a judge's verdict and the label that a reward model learns from."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.data.records import SampledComparison


@dataclass(frozen=True)
class LabelledPair:
    """Two answers to a prompt, with the judge's verdict and the resulting label.

    Attributes:
        prompt: The templated prompt.
        first: One answer.
        second: The other answer.
        outcome: The judge's verdict: 1 if `first` is better, 0 if `second` is, ½ for a tie, None without a verdict.
        dropped: Why the pair is not used as a comparison (`identical`, `unjudged` or `tie`), None if it is used.
        preferred: The answer that the label prefers (`first` or `second`), None if the pair is dropped.
        flipped: Whether the label was flipped, so that it prefers the worse answer.
    """

    prompt: str
    first: str
    second: str
    outcome: float | None = None
    dropped: str | None = None
    preferred: str | None = None
    flipped: bool = False

    @property
    def comparison(self) -> SampledComparison:
        """The comparison that the reward model learns from."""
        texts = (self.first, self.second) if self.preferred == "first" else (self.second, self.first)
        return SampledComparison(self.prompt, *texts, *(getattr(text, "ended", True) for text in texts))


def count_labels(rows: Sequence[LabelledPair]) -> dict[str, int]:
    """Count the pairs by what became of them. `comparisons` are those that were not dropped."""
    dropped = [row.dropped for row in rows]
    return {
        "pairs": len(rows),
        "identical": dropped.count("identical"),
        "unjudged": dropped.count("unjudged"),
        "ties": sum(row.outcome == 0.5 for row in rows),
        "flipped": sum(row.flipped for row in rows),
        "comparisons": dropped.count(None),
    }
