"""`rlhf-chat` shows the reward of runs with `scorer=function`, or why there is none."""

import json
from pathlib import Path

import pytest

from rlhf.files import read_json, write_json
from rlhf.finished.chat.responders import Answer, Responder, Sampling, open_responders
from rlhf.finished.run import FinishedRun
from rlhf.models.tokenizing import Response
from tests.helpers.finished_runs import TEMPLATE, finished_outputs

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
    assert responder.reward is None, "the reward model of the run, which only judged, is not loaded"
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
