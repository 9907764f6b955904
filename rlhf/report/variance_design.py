"""Which sources of luck the seeds of a sweep tell apart, and what one more of each costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from rlhf.report.costs import UpstreamCosts, evaluation_cost, upstream_costs
from rlhf.report.runs import Sweep
from rlhf.report.variance import Sources
from rlhf.tracking.seeds import Seeds

STAGES = ("SFT", "preferences", "reward", "PPO")  # by the position of their seed in `Seeds`
# what to call a source by the stages that it consists of
MODELS = {"SFT": "SFT models", "preferences": "preferences", "reward": "reward models", "PPO": "PPO seeds"}
ONE = {"SFT": "pipeline", "preferences": "set of preferences", "reward": "reward model", "PPO": "PPO seed"}


@dataclass(frozen=True)
class Design:
    """Which sources the seeds of a sweep tell apart.

    Attributes:
        depths: for each source, the outermost first, how many leading seeds tell its groups apart.
        stages: for each source, the stages that vary together in it.
        fixed: the stages that do not vary.
        freedom: the degrees of freedom on which the variance of the outermost source rests. Models that several rows
            start from count once.
    """

    depths: tuple[int, ...]
    stages: tuple[tuple[str, ...], ...]
    fixed: tuple[str, ...]
    freedom: int

    @classmethod
    def of(cls, sweep: Sweep) -> "Design":
        """A source begins at each stage whose seed divides the groups of the stages above it."""
        depths, before, freedom = list[int](), len(sweep.trained), 0
        for depth in range(1, len(Seeds._fields) + 1):
            groups = {(row.label, run.seeds[:depth]) for row in sweep.trained for run in row.runs}
            if len(groups) > before:
                different = len({seeds for _, seeds in groups}) - 1
                freedom = freedom or (different if depth < len(STAGES) else len(groups) - before)
                depths.append(depth)
            before = len(groups)
        stages = [STAGES[start - 1 : end - 1] for start, end in pairwise([*depths, len(STAGES) + 1])]
        fixed = STAGES[: depths[0] - 1] if depths else STAGES
        return cls(tuple(depths), tuple(stages), tuple(stage for stage in fixed if stage != "preferences"), freedom)

    @property
    def names(self) -> list[str]:
        """The name of each source: the stages whose seeds move together."""
        return [_together(stages) for stages in self.stages]

    @property
    def units(self) -> list[str]:
        """What one more of each source is called."""
        return [ONE[_named(stages)[0]] for stages in self.stages]

    def source_of(self, stage: str) -> int | None:
        """The position of the source in which a stage varies; None if it does not."""
        return next((number for number, stages in enumerate(self.stages) if stage in stages), None)


class Costs(NamedTuple):
    """What things cost in PPO runs: evaluating a run's present instructions, and one model of each stage above PPO.

    All rows use these models, so each row bears its share. 0 stands for an unknown cost.
    """

    evaluation: float
    upstream: UpstreamCosts

    @classmethod
    def of(cls, sweep: Sweep) -> "Costs":
        """By the times that the runs recorded."""
        found = upstream_costs(sweep.finished)
        shared = UpstreamCosts(*(cost / len(sweep.trained) for cost in found))
        return cls(evaluation_cost(sweep.finished), shared)

    def of_more(self, sources: Sources, design: Design, source: int) -> float:
        """What one more of a source in each group above it costs a row: PPO runs, and what they start from."""
        added = sources.groups_added(source)
        above = [(design.source_of(stage), cost) for stage, cost in zip(STAGES, self.upstream, strict=False)]
        return float(added[-1] + sum(cost * added[place] for place, cost in above if place is not None))

    def of_instructions(self, sources: Sources, more: int) -> float:
        """What `more` instructions cost a row."""
        runs = float((1 / sources.shares[:, -1]).mean())
        return self.evaluation * more / max(sources.prompts, 1) * runs


def _together(stages: Sequence[str]) -> str:
    """The name of a source: the stages whose seeds move together; where reward models move, so do their preferences."""
    if len(stages) == len(STAGES):
        return "pipelines"
    return " with ".join(MODELS[stage] for stage in _named(stages))


def _named(stages: Sequence[str]) -> Sequence[str]:
    """The stages that a source is named after: preferences only if they vary alone."""
    return [stage for stage in stages if stage != "preferences"] or stages
