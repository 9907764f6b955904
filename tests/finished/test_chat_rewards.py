"""`rlhf-chat` shows the reward of an answer by whatever rewarded the run, or why there is none."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from rlhf.files import read_json, write_json
from rlhf.finished.chat.responders import Answer, Responder, Sampling, open_responders
from rlhf.finished.chat.rewards import TextReward
from rlhf.finished.run import FinishedRun
from rlhf.models.tokenizing import Response
from rlhf.scorers import Context, TextScorer
from tests.helpers.finished_runs import TEMPLATE, finished_outputs, run_config

PROMPT = "w9 w7"


def words(prompts: list[str], responses: list[str]) -> list[float]:
    return [10.0 * len(prompt.split()) + len(text.split()) for prompt, text in zip(prompts, responses, strict=True)]


def each_token(prompts: list[str], responses: list[Response]) -> list[list[float]]:
    return [[0.5] * len(response.ids) for response in responses]


def number_of_row(prompts: list[str], responses: list[str], number: list[int]) -> list[float]:
    return [float(value) for value in number]


def broken(prompts: list[str], responses: list[str]) -> list[float]:
    raise ValueError("no words")


def chat(folder: Path, function: str, **data: object) -> Responder:
    """A chat with a run of PPO whose reward was a function of this module."""
    run = finished_outputs(folder / "outputs", "scorer=function", f"scorer.function={__name__}.{function}").ppo
    summary = read_json(run / "summary.json")
    if data:
        summary["config"]["data"] = {"_target_": "rlhf.data.hub.Hub", "template": TEMPLATE, **data}
        write_json(run / "summary.json", summary)
    return open_responders([FinishedRun.open(run)], scored=True, seed=0)[0]


def last(responder: Responder, prompt: str = PROMPT) -> Answer:
    return list(responder.answer(prompt, Sampling(temperature=0, max_new_tokens=9)))[-1]


def test_the_reward_is_what_the_function_returns_for_the_rendered_prompt_and_the_answer(tmp_path: Path) -> None:
    responder = chat(tmp_path, "words")
    assert isinstance(responder.reward, TextReward), "the reward model of the run, which only judged, is not loaded"
    answer = last(responder)
    assert answer.scores == {"reward": 40 + len(answer.text.split())}
    assert answer.note.startswith(f"reward {answer.scores['reward']:.2f}, {answer.tokens} token")


def test_rewards_of_tokens_are_summed(tmp_path: Path) -> None:
    answer = last(chat(tmp_path, "each_token"))
    assert answer.scores == {"reward": 0.5 * answer.tokens}


def test_a_prompt_of_the_data_has_the_columns_that_the_function_asks_for_and_another_says_why_not(
    tmp_path: Path,
) -> None:
    rows = [{"prompt": PROMPT, "number": 3}, {"prompt": "w8", "number": 4}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    responder = chat(tmp_path, "number_of_row", prompts=str(tmp_path / "rows.jsonl"), keep=["number"])
    assert last(responder).scores == {"reward": 3.0}
    other = last(responder, "w5")
    assert not other.scores
    assert other.note.endswith(
        f"; no reward: {__name__}.number_of_row asks for number, which this prompt does not have"
    )


def test_a_function_that_fails_is_named_and_the_conversation_goes_on(tmp_path: Path) -> None:
    note = last(chat(tmp_path, "broken")).note
    assert f"no reward: {__name__}.broken failed: {__file__}, line " in note
    assert note.endswith("in broken: ValueError: no words")


@pytest.mark.parametrize(
    ("function", "said"), [("nowhere", "nowhere cannot be imported"), ("number_of_row", "does not exist")]
)
def test_what_cannot_be_used_is_said_once(
    tmp_path: Path, function: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    responder = chat(tmp_path, function, prompts=str(tmp_path / "nowhere.jsonl"))
    (line,) = [record.message for record in caplog.records if "no reward" in record.message]
    assert line.startswith("ppo: no reward: ")
    assert said in line
    assert not last(responder).scores
    assert "no reward" not in last(responder).note


class WordCount(TextScorer):
    def __init__(self, context: Context, each: float) -> None:
        self.each = each

    def rate(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        return torch.tensor([self.each * len(text.split()) for text in responses])


class Whole:
    needs_reward_model: ClassVar[bool] = False


def chat_with(folder: Path, *overrides: str, **summary: object) -> Responder:
    """A chat with a run of PPO, whose summary has other entries."""
    run = finished_outputs(folder / "outputs", *overrides).ppo
    content = read_json(run / "summary.json") | summary
    write_json(run / "summary.json", content)
    return open_responders([FinishedRun.open(run)], scored=True, seed=0)[0]


def test_a_baseline_of_the_configuration_goes_before_that_of_the_reward_model(tmp_path: Path) -> None:
    known = last(chat_with(tmp_path / "a")).scores["reward"]  # less 0.5, the mean score of demonstrations
    assert last(chat_with(tmp_path / "b", "scorer.baseline=0.2")).scores == {"reward": pytest.approx(known + 0.3)}


@pytest.mark.parametrize(
    ("combine", "below"), [("mean", 0.7), ("worst_case", 0.9), ("uncertainty_weighted", 0.7 + 3 * 0.2**2)]
)
def test_the_reward_of_an_ensemble_is_that_of_all_its_members(tmp_path: Path, combine: str, below: float) -> None:
    """Two equal reward models with baselines of 0.5 and 0.9; their standard deviation is 0.2."""
    known = last(chat_with(tmp_path / "a")).scores["reward"] + 0.5
    outputs = tmp_path / "b" / "outputs"
    overrides = ["scorer=ensemble", f"scorer.combine={combine}", "scorer.uncertainty_coef=3"]
    run = finished_outputs(outputs, *overrides).ppo
    shutil.copytree(outputs / "cache/reward-0", outputs / "cache/reward-1")
    for file, change in (
        (outputs / "cache/reward-1/summary.json", {"metrics": {"reward/baseline": 0.9}}),
        (run / "summary.json", {"reward_members": ["reward-1"]}),
    ):
        write_json(file, read_json(file) | change)
    (responder,) = open_responders([FinishedRun.open(run)], scored=True, seed=0)
    assert last(responder).scores == {"reward": pytest.approx(known - below, abs=1e-5)}


def test_a_reward_model_that_is_not_the_whole_reward_is_called_by_its_name(tmp_path: Path) -> None:
    known = last(chat_with(tmp_path / "a")).scores["reward"]
    assert last(chat_with(tmp_path / "b", "scorer=weighted_sum")).scores == {"reward model": pytest.approx(known)}


def test_any_scorer_of_texts_is_asked(tmp_path: Path) -> None:
    own = {"_target_": f"{__name__}.WordCount", "each": 0.25}
    answer = last(chat_with(tmp_path, config=run_config() | {"scorer": own}, reward_model=None))
    assert answer.scores == {"reward": 0.25 * len(answer.text.split())}


def test_a_scorer_of_whole_rollouts_is_said_to_have_no_reward_here(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = {"_target_": f"{__name__}.Whole"}
    assert not last(chat_with(tmp_path, config=run_config() | {"scorer": own}, reward_model=None)).scores
    assert f"ppo: no reward: scorer._target_={__name__}.Whole scores whole rollouts" in caplog.messages


def test_a_run_that_needed_no_reward_model_is_not_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """DPO's configuration has the scorer of the others, and no reward model."""
    assert not last(chat_with(tmp_path, stage="dpo", reward_model=None)).scores
    assert not [message for message in caplog.messages if "no reward" in message]
