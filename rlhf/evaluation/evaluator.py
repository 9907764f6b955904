"""Turns the responses to the evaluation prompts into metrics."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf.data.records import DataSource, Prompt
from rlhf.data.special_tokens import unmarked
from rlhf.evaluation.factscore import FactScore
from rlhf.evaluation.length_control import Rate, length_adjusted_win_rate, length_controlled_win_rate
from rlhf.evaluation.prompts import instruction_or_prompt
from rlhf.evaluation.repetition import distinct_ngrams
from rlhf.scorers import TextScorer

Judge = Callable[[Sequence[Prompt], Sequence[str]], Sequence[float | None]]
"""Compares each response with its reference output: 1 for a win, ½ for a draw, 0 for a loss, None without a verdict."""
Export = Callable[[Sequence[Prompt], Sequence[str]], None]
"""Writes all prompts and responses to a file."""


class ResponseEvaluator:
    """Computes the metrics of a policy's responses.

    The judge's outcomes give the win rates against the reference outputs (a draw counts ½), over the pairs that the
    judge could judge. `eval/distinct_2` is the share of distinct word pairs (Li et al. 2016). A data set may add
    metrics of its own:

    - `utility(prompt, response)` gives `eval/gold_utility`, the mean over responses;
    - `facts(prompt, response)`, a pair (stated, true) of counts, gives `eval/factual_precision` (true / stated, summed
      over all responses) and `eval/facts_per_response` (the mean of stated);
    - `group(prompt)`, the name of a part of the prompts ("" for none), gives the precision of each part as
      `eval/factual_precision_<group>`.

    Args:
        source: The data set.
        judge: Compares responses with reference outputs.
        export: Called with all prompts and responses before they are judged.
        factscore: If given, the prompts are about its entities, and its metrics replace all others.
        difficulty: The difficulty of each instruction. If given, the length-controlled win rate is computed as well.
        gold: If given, its scores are the utility, in place of the data set's own.
    """

    def __init__(
        self,
        source: DataSource,
        judge: Judge,
        export: Export | None = None,
        factscore: FactScore | None = None,
        difficulty: Mapping[str, float] | None = None,
        gold: TextScorer | None = None,
    ):
        self.source, self.judge, self.export, self.factscore = source, judge, export, factscore
        self.difficulty, self.gold = difficulty, gold

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Evaluate the responses.

        Returns:
            The metrics, and a record per response with its texts and results.
        """
        # 1. Export first, because the judge may fail.
        if self.export:
            self.export(prompts, responses)
        records: list[dict[str, Any]] = [
            {"prompt": unmarked(row.prompt), "response": str(response), "reference_output": row.reference_output}
            for row, response in zip(prompts, responses, strict=True)
        ]
        # 2. FActScore replaces everything else: its prompts have no reference outputs.
        if self.factscore:
            metrics, results = self.factscore(prompts, responses)
            return metrics, [{**record, **result} for record, result in zip(records, results, strict=True)]
        # 3. The judge.
        metrics = {"eval/distinct_2": distinct_ngrams([response.split() for response in responses])}
        outcomes = self._judge(prompts, responses)
        if outcomes:
            metrics |= win_rates(prompts, responses, outcomes, self.difficulty) | getattr(self.judge, "report", {})
            _add_column(records, "win", outcomes)
        # 4. What the gold score and the data set itself know.
        pairs = [(row.prompt, response) for row, response in zip(prompts, responses, strict=True)]
        if self.gold or hasattr(self.source, "utility"):
            utilities = self._utilities(pairs)
            metrics["eval/gold_utility"] = statistics.fmean(utilities)
            metrics["eval/gold_utility_se"] = standard_error(utilities)
            _add_column(records, "gold_utility", utilities)
        if hasattr(self.source, "facts"):
            facts = [self.source.facts(*pair) for pair in pairs]
            stated, true = sum(f.stated for f in facts), sum(f.true for f in facts)
            metrics["eval/facts_per_response"] = stated / len(facts)
            metrics["eval/factual_precision"] = true / stated if stated else 0.0
            groups = [self.source.group(row.prompt) for row in prompts] if hasattr(self.source, "group") else []
            metrics |= precision_by_group(groups, facts)
            _add_column(records, "stated", [f.stated for f in facts])
            _add_column(records, "true", [f.true for f in facts])
        return metrics, records

    def _utilities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Return the gold utility of each (prompt, response)."""
        if self.gold:
            return self.gold.rate(*map(list, zip(*pairs, strict=True))).tolist()
        return [self.source.utility(*pair) for pair in pairs]  # type: ignore[attr-defined]

    def _judge(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float | None]:
        """Return the judge's outcomes.

        They are None for prompts without a reference output. The list is empty if no prompt has one, or if the judge
        does not compare at all.
        """
        compared = [i for i, row in enumerate(prompts) if row.reference_output]
        outcomes = self.judge([prompts[i] for i in compared], [responses[i] for i in compared]) if compared else []
        by_index = dict(zip(compared, outcomes, strict=True)) if outcomes else {}
        return [by_index.get(i) for i in range(len(prompts))] if by_index else []


def evaluation_metrics(
    source: DataSource, judged: bool, factscore: bool, difficulty: bool = False, gold: bool = False
) -> list[str]:
    """Return the names of the metrics that an evaluation with this configuration logs, without standard errors."""
    names = ["eval/reward", "eval/response_tokens", "eval/true_kl"]
    if factscore:
        facts = ["eval/factual_precision", "eval/facts_per_response"]
        return [*names, "eval/factscore", *facts, "eval/responding_ratio"]
    names += ["eval/distinct_2"]
    if judged:
        names += ["eval/win_rate", "eval/length_adjusted_win_rate"]
        names += ["eval/length_controlled_win_rate"] if difficulty else []
    if gold or hasattr(source, "utility"):
        names += ["eval/gold_utility"]
    if hasattr(source, "facts"):
        names += ["eval/facts_per_response", "eval/factual_precision"]
        names += [f"eval/factual_precision_{group}" for group in getattr(source, "groups", ())]
    return names


def win_rates(
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    outcomes: Sequence[float | None],
    difficulty: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Return the win rate and the win rates at equal length with their standard errors, as metrics `eval/*`.

    Pairs without a verdict (outcome None) are left out. All values are nan if no pair has one. AlpacaEval's
    length-controlled win rate needs the `difficulty` of each instruction.
    """
    judged = [(row, text, won) for row, text, won in zip(prompts, responses, outcomes, strict=True) if won is not None]
    won = [outcome for *_, outcome in judged]
    ours, theirs = [len(text) for _, text, _ in judged], [len(row.reference_output) for row, *_ in judged]
    undefined = Rate(math.nan, math.nan)
    rates = {
        "win_rate": Rate(statistics.fmean(won), standard_error(won)) if won else undefined,
        "length_adjusted_win_rate": length_adjusted_win_rate(won, ours, theirs) if won else undefined,
    }
    if difficulty is not None:
        difficulties = [difficulty[instruction_or_prompt(row)] for row, *_ in judged]
        controlled = length_controlled_win_rate(won, ours, theirs, difficulties) if won else undefined
        rates["length_controlled_win_rate"] = controlled
    return {
        f"eval/{name}{end}": x for name, rate in rates.items() for end, x in (("", rate.value), ("_se", rate.error))
    }


def precision_by_group(groups: Sequence[str], facts: Sequence[Any]) -> dict[str, float]:
    """Return true / stated facts of each group as `eval/factual_precision_<group>`, 0 if it states none.

    `facts` holds a pair (stated, true) for each prompt, and `groups` its group ("" for none), or nothing at all.
    """
    stated, true = Counter[str](), Counter[str]()
    for group, counts in zip(groups, facts, strict=False):
        stated[group] += counts.stated
        true[group] += counts.true
    return {f"eval/factual_precision_{group}": true[group] / max(n, 1) for group, n in stated.items() if group}


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean, nan for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _add_column(records: list[dict[str, Any]], key: str, values: Sequence[Any]) -> None:
    for record, value in zip(records, values, strict=True):
        record[key] = value
