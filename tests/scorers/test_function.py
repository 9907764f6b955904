"""`scorer=function`: the columns of the data set that it is given, and rewards of single tokens."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from rlhf import ppo
from rlhf.data.hub import Hub
from rlhf.data.records import Prompt, as_records
from rlhf.errors import ConfigError, DataError
from rlhf.models.sequences import Sequences
from rlhf.models.tokenizing import Response
from rlhf.rollout.sample import Rollouts
from rlhf.scorers import TextContext, totals
from rlhf.scorers.columns import Columns, check_columns
from rlhf.scorers.combine import WeightedSum
from rlhf.scorers.text import FunctionScorer
from rlhf.stages.scoring import score
from tests.helpers.command_line import TINY, run_in_process
from tests.helpers.ppo_stages import make_ppo, ppo_settings, train


class Asked:
    """Two prompts to train on and one to evaluate, with the right answers."""

    splits = ("prompts", "eval")

    def load(self, split: str) -> Dataset:
        rows = {"prompts": (["1 + 1", "2 + 2"], [2, 4]), "eval": (["3 + 3"], [6])}
        texts, answers = rows[split]
        empty = [""] * len(texts)
        return Dataset.from_dict({"prompt": texts, "reference_output": empty, "instruction": texts, "answer": answers})


def right(prompts: list[str], responses: list[str], answer: list[int | None]) -> list[float]:
    return [float(response == str(number)) for response, number in zip(responses, answer, strict=True)]


def count_columns(prompts: list[str], responses: list[str], **columns: list[Any]) -> list[float]:
    return [float(len(columns))] * len(responses)


def each_id(prompts: list[str], responses: list[Response]) -> list[list[float]]:
    return [[float(token) for token in response.ids] for response in responses]


def none_for_the_last(prompts: list[str], responses: list[Response]) -> list[list[float]]:
    return [[0.0] * (len(response.ids) - 1) for response in responses]


def one_too_few(prompts: list[str], responses: list[str]) -> list[float]:
    return [0.0] * (len(responses) - 1)


def scorer(name: str, source: Any = None) -> FunctionScorer:
    return FunctionScorer(TextContext(source or Asked()), f"{__name__}.{name}")


def test_a_function_is_given_the_columns_that_it_names() -> None:
    """In training and in evaluation; a prompt from elsewhere has none."""
    assert scorer("right").rate(["2 + 2", "3 + 3", "9"], ["4", "5", "None"]).tolist() == [1, 0, 1]
    assert scorer("count_columns").rate(["1 + 1"], ["2"]).tolist() == [3]  # reference_output, instruction, answer


def test_a_column_that_is_required_must_be_there() -> None:
    def asks(prompts: list[str], responses: list[str], tests: list[str], scale: float = 1.0) -> None: ...

    with pytest.raises(ConfigError, match=r"^scorer\.function asks for tests, which no row .* instruction, answer$"):
        check_columns("scorer.function", asks, Asked())
    check_columns("scorer.function", right, Asked())


def test_a_prompt_with_two_answers_is_refused() -> None:
    class Twice(Asked):
        def load(self, split: str) -> Dataset:
            return Dataset.from_dict({"prompt": ["a", "a"], "answer": [1, 1 + (split == "eval")]})

    with pytest.raises(DataError, match="the prompt 'a' has two values of answer, '1' and '2'"):
        Columns(right, Twice())


def test_further_columns_are_no_part_of_a_record() -> None:
    assert as_records(Asked().load("eval"), "eval") == [Prompt("3 + 3", "", "3 + 3")]


def test_hub_data_keep_columns(tmp_path: Path) -> None:
    """Strings and numbers as they are, values of several types as JSON."""
    rows = [{"prompt": "a", "number": 4, "mixed": [1]}, {"prompt": "b", "number": 5, "mixed": "x"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = {"with_input": "{instruction} {input}", "without_input": "{instruction}"}
    source = Hub(template=template, root=str(tmp_path), prompts="rows.jsonl", keep=["number", "mixed"])
    found = source.load("prompts")
    assert found["prompt"][:] == ["a", "b"]
    assert found["number"][:] == [4, 5]
    assert found["mixed"][:] == ["[1]", '"x"']
    assert "number" not in Hub(template=template, root=str(tmp_path), prompts="rows.jsonl").load("prompts").column_names
    with pytest.raises(DataError, match=r"^data\.keep: no row of data\.prompts has a column tests"):
        Hub(template=template, root=str(tmp_path), prompts="rows.jsonl", keep=["tests"]).load("prompts")
    with pytest.raises(DataError, match="a prompt has a column instruction of its own"):
        Hub(template=template, root=str(tmp_path), prompts="rows.jsonl", keep=["instruction"])


RESPONSES = [Response("a", [5, 7, 1]), Response("b", [6])]
ROWS = Sequences.from_lists([[3], [4, 4]], [list(response.ids) for response in RESPONSES])


def rollouts() -> Rollouts:
    return Rollouts(ROWS, None, torch.tensor([True, False]), ["1 + 1", "2 + 2"], list(RESPONSES))


def test_rewards_of_tokens_add_up_to_the_score_and_stay_where_they_are(
    folders: SimpleNamespace, tmp_path: Path
) -> None:
    """A missing EOS, say, is charged to the last token; the divergence to every token."""
    batch, stage = rollouts(), make_ppo(ppo_settings(), folders, tmp_path / "samples")
    stage.scorer = scorer("each_id")
    scores = score(stage, batch, 1)
    assert scores.tolist() == [13, 6]
    assert batch.token_rewards is not None
    assert batch.token_rewards.tolist() == [[5, 7, 1], [6, 0, 0]]
    penalty = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]])
    shaped = ppo.shape_rewards(scores - torch.tensor([0.0, 1.0]), penalty, batch.mask, 0.5, batch.token_rewards)
    assert shaped.tolist() == [[4.5, 6, -0.5], [3, 0, 0]]


def test_other_numbers_of_rewards_are_refused() -> None:
    with pytest.raises(ConfigError, match="returned 2 rewards for a response of 3 tokens; allowed: one per token"):
        scorer("none_for_the_last")(rollouts())
    with pytest.raises(ConfigError, match=r"returned \[0\.0\] for 2 responses; allowed: a list of as many numbers"):
        scorer("one_too_few")(rollouts())


def test_a_sum_puts_scores_of_whole_answers_on_the_last_token() -> None:
    terms = [
        {"weight": 2.0, "scorer": {"_target_": "rlhf.scorers.text.FunctionScorer", "function": f"{__name__}.each_id"}},
        {"weight": 1.0, "scorer": {"_target_": "rlhf.scorers.combine.LengthPenalty"}},
    ]
    found = WeightedSum(TextContext(Asked()), terms)(rollouts())
    assert found.tolist() == [[10, 14, 2 - 3], [12 - 1, 0, 0]]
    assert totals(found).tolist() == [23, 11]


def test_ppo_learns_from_rewards_of_tokens(folders: SimpleNamespace, tmp_path: Path) -> None:
    """What each token is paid is in its reward, and their sum is the logged score."""
    stage = make_ppo(ppo_settings(steps=1, missing_eos_penalty=0.0), folders, tmp_path / "samples")
    stage.scorer = scorer("each_id")
    kept = []
    make = stage.make_experience
    stage.make_experience = lambda *given: kept.append(make(*given)) or kept[-1]  # type: ignore[method-assign, func-returns-value]
    (row,) = train(stage, tmp_path)
    (experience,) = kept
    ids = experience.sequences.responses()
    assert row["ppo/reward"] == pytest.approx(sum(map(sum, ids)) / len(ids))
    found = experience.rewards + 0.05 * experience.penalty
    for rewards, tokens in zip(found, ids, strict=True):
        assert rewards[: len(tokens)].tolist() == pytest.approx(tokens, abs=1e-3)


@pytest.mark.slow
def test_a_run_is_rewarded_by_a_column_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """A column that the file lacks is told before anything is trained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("checked.py").write_text(
        "def score(prompts, responses, answer):\n"
        "    return [float(want is not None) for want in answer]\n\n\n"
        "def other(prompts, responses, tests):\n    return [0.0] * len(responses)\n"
    )
    rows = [{"instruction": f"say {i}", "output": f"{i} it is", "answer": str(i)} for i in range(40)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [word for word in TINY if not word.startswith("data")]
    files = ["data=hub", 'data.sft="rows.jsonl[:30]"', 'data.prompts="rows.jsonl[:30]"', 'data.eval="rows.jsonl[30:]"',
             "data.keep=[answer]", "judge=none", "scorer=function"]  # fmt: skip
    assert run_in_process(*own, *files, "scorer.function=checked.other") == 2
    assert "scorer.function asks for tests, which no row" in capfd.readouterr().err
    assert not list(Path("outputs").glob("cache/sft-*"))
    assert run_in_process(*own, *files, "scorer.function=checked.score", "hydra.run.dir=outputs/run") == 0
    summary = json.loads(Path("outputs/run/summary.json").read_text())
    assert summary["metrics"]["eval/reward"] == 1.0
