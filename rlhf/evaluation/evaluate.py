"""From answers to metrics."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf.data.records import DataSource, Prompt
from rlhf.evaluation.factscore import FactScore
from rlhf.evaluation.length_control import Rate, length_adjusted_win_rate, length_controlled_win_rate

Judge = Callable[[Sequence[Prompt], Sequence[str]], Sequence[float | None]]
Export = Callable[[Sequence[Prompt], Sequence[str]], None]


class Evaluation:
    """Win rate against the reference outputs (draws ½, with its standard error), and what the data set itself knows.

    The win rates are over the pairs that the judge could judge. `export` is handed all prompts and responses; with
    `factscore` the prompts are its entities, and it alone measures. `difficulty` of the instructions gives the
    length-controlled win rate.

    A data set that offers `utility(prompt, response)` gives `eval/gold_utility`; one that offers `facts(prompt,
    response)` -> (stated, true) gives `eval/factual_precision` (true / stated over all responses) and
    `eval/facts_per_response` (stated).
    """

    def __init__(
        self,
        source: DataSource,
        judge: Judge,
        export: Export | None = None,
        factscore: FactScore | None = None,
        difficulty: Mapping[str, float] | None = None,
    ):
        self.source, self.judge, self.export, self.factscore = source, judge, export, factscore
        self.difficulty = difficulty

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """(metrics, a record per response)."""
        if self.export:
            self.export(prompts, responses)  # before the judge, which may fail
        records: list[dict[str, Any]] = [
            {"prompt": row.prompt, "response": str(response), "reference_output": row.reference_output}
            for row, response in zip(prompts, responses, strict=True)
        ]
        if self.factscore:
            metrics, found = self.factscore(prompts, responses)
            return metrics, [{**record, **more} for record, more in zip(records, found, strict=True)]
        metrics = {}
        outcomes = self._judged(prompts, responses)
        if outcomes:
            metrics |= win_rates(prompts, responses, outcomes, self.difficulty) | getattr(self.judge, "report", {})
            _add(records, "win", outcomes)
        pairs = [(row.prompt, response) for row, response in zip(prompts, responses, strict=True)]
        if hasattr(self.source, "utility"):
            utilities = [self.source.utility(*pair) for pair in pairs]
            metrics["eval/gold_utility"] = statistics.fmean(utilities)
            metrics["eval/gold_utility_se"] = standard_error(utilities)
            _add(records, "gold_utility", utilities)
        if hasattr(self.source, "facts"):
            facts = [self.source.facts(*pair) for pair in pairs]
            stated, true = sum(f.stated for f in facts), sum(f.true for f in facts)
            metrics["eval/facts_per_response"] = stated / len(facts)
            metrics["eval/factual_precision"] = true / stated if stated else 0.0
            _add(records, "stated", [f.stated for f in facts])
            _add(records, "true", [f.true for f in facts])
        return metrics, records

    def _judged(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float | None]:
        """The judge's outcomes; None for a prompt without a reference output, nothing if no prompt has one."""
        compared = [i for i, row in enumerate(prompts) if row.reference_output]
        found = self.judge([prompts[i] for i in compared], [responses[i] for i in compared]) if compared else []
        by_place = dict(zip(compared, found, strict=True)) if found else {}
        return [by_place.get(i) for i in range(len(prompts))] if by_place else []


def logged(source: DataSource, judged: bool, factscore: bool, difficulty: bool = False) -> list[str]:
    """The metrics that evaluations of a policy log, as far as a configuration tells; not their standard errors."""
    names = ["eval/reward", "eval/response_tokens", "eval/true_kl"]
    if factscore:
        facts = ["eval/factual_precision", "eval/facts_per_response"]
        return [*names, "eval/factscore", *facts, "eval/responding_ratio"]
    if judged:
        names += ["eval/win_rate", "eval/length_adjusted_win_rate"]
        names += ["eval/length_controlled_win_rate"] if difficulty else []
    if hasattr(source, "utility"):
        names += ["eval/gold_utility"]
    if hasattr(source, "facts"):
        names += ["eval/facts_per_response", "eval/factual_precision"]
    return names


def win_rates(
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    outcomes: Sequence[float | None],
    difficulty: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Win rate and win rates at equal length with their standard errors, over the judged pairs; nan if there are none.

    With the `difficulty` of each instruction also AlpacaEval's length-controlled win rate.
    """
    judged = [(row, text, won) for row, text, won in zip(prompts, responses, outcomes, strict=True) if won is not None]
    won = [outcome for *_, outcome in judged]
    ours, theirs = [len(text) for _, text, _ in judged], [len(row.reference_output) for row, *_ in judged]
    nothing = Rate(math.nan, math.nan)
    rates = {
        "win_rate": Rate(statistics.fmean(won), standard_error(won)) if won else nothing,
        "length_adjusted_win_rate": length_adjusted_win_rate(won, ours, theirs) if won else nothing,
    }
    if difficulty is not None:
        hard = [difficulty[instruction_of(row)] for row, *_ in judged]
        found = length_controlled_win_rate(won, ours, theirs, hard) if won else nothing
        rates["length_controlled_win_rate"] = found
    return {
        f"eval/{name}{end}": x for name, rate in rates.items() for end, x in (("", rate.value), ("_se", rate.error))
    }


def instruction_of(prompt: Prompt) -> str:
    """What AlpacaEval's files call the instruction."""
    return prompt.instruction or prompt.prompt


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean; nan for fewer than two values, which say nothing of it."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _add(records: list[dict[str, Any]], key: str, values: Sequence[Any]) -> None:
    for record, value in zip(records, values, strict=True):
        record[key] = value
