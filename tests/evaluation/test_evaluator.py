"""What an evaluation reports beside win rates: the gold score and the diversity of the responses."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.data.records import Prompt
from rlhf.evaluation.evaluator import ResponseEvaluator, evaluation_metrics
from rlhf.evaluation.judges import NoJudge
from rlhf.evaluation.repetition import distinct_ngrams
from rlhf.files import read_lines
from rlhf.scorers.text import FunctionScorer
from rlhf.tracking.metrics_file import evaluated_at
from tests.helpers.command_line import TINY
from tests.helpers.scorer_context import NoSource, scorer_context


class WithUtility(NoSource):
    """A data set with a utility of its own."""

    def utility(self, prompt: str, response: str) -> float:
        return -1.0


def words(prompts: list[str], responses: list[str]) -> list[float]:
    """The number of words, 100 more for each word of the prompt."""
    return [100.0 * len(p.split()) + len(r.split()) for p, r in zip(prompts, responses, strict=True)]


PROMPTS = [Prompt("one"), Prompt("one two")]
RESPONSES = ["a b a b", "a b c"]


@pytest.mark.parametrize("source", [NoSource(), WithUtility()], ids=["no utility", "a utility of its own"])
def test_the_gold_score_is_the_utility(source: NoSource, tmp_path: Path) -> None:
    context = scorer_context(tmp_path)
    gold = FunctionScorer(context, f"{__name__}.words")
    metrics, records = ResponseEvaluator(source, NoJudge(context), gold=gold)(PROMPTS, RESPONSES)
    assert [record["gold_utility"] for record in records] == [104.0, 203.0]
    assert metrics["eval/gold_utility"] == 153.5
    assert metrics["eval/gold_utility_se"] == pytest.approx(99 / 2)
    logged = {name for name in metrics if not name.endswith("_se")}
    assert logged == set(evaluation_metrics(source, judged=False, factscore=False, gold=True)) - {
        "eval/reward", "eval/response_tokens", "eval/true_kl",
    }  # fmt: skip


def test_without_a_gold_score_the_utility_is_that_of_the_data_set(tmp_path: Path) -> None:
    judge = NoJudge(scorer_context(tmp_path))
    metrics, _ = ResponseEvaluator(WithUtility(), judge)(PROMPTS, RESPONSES)
    assert metrics["eval/gold_utility"] == -1
    assert "eval/gold_utility" not in ResponseEvaluator(NoSource(), judge)(PROMPTS, RESPONSES)[0]


def test_diversity_by_hand(tmp_path: Path) -> None:
    assert distinct_ngrams([row.split() for row in RESPONSES]) == 3 / 5  # ab ba ab, ab bc
    assert distinct_ngrams([[1, 2, 3]] * 4) == 2 / 8
    assert distinct_ngrams([[1, 2, 3], [4, 5]], n=3) == 1
    assert distinct_ngrams([[1], []]) == 0  # no pairs
    metrics, _ = ResponseEvaluator(NoSource(), NoJudge(scorer_context(tmp_path)))(PROMPTS, RESPONSES)
    assert metrics["eval/distinct_2"] == 3 / 5


@pytest.mark.slow
def test_a_run_is_measured_by_its_gold_score(command: Callable, tmp_path: Path) -> None:
    """It takes the place of the farm's own utility, at every evaluation."""
    chosen = ["+scorer@evaluation.gold=function", f"evaluation.gold.function={__name__}.words", "judge=none"]
    assert command(*TINY, *chosen, f"output_dir={tmp_path}/outputs", "evaluation.samples=4")[0] == 0
    (folder,) = (tmp_path / "outputs" / "rlhf").iterdir()
    for step in (0, 3):
        samples = [line for line in read_lines(folder / "samples.jsonl") if line["step"] == step]
        expected = words(*([line[key] for line in samples] for key in ("prompt", "response")))
        assert [line["gold_utility"] for line in samples] == expected
        assert evaluated_at(folder, step)["eval/gold_utility"] == pytest.approx(sum(expected) / 4)
