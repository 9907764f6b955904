"""Pools of LLM judges: order of the answers, weights, cache, cost, and answers that cannot be parsed."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.records import Prompt
from rlhf.errors import ConfigError
from rlhf.evaluation.client import ChatClient, uniform_from_hash
from rlhf.evaluation.client_settings import ClientSettings
from rlhf.evaluation.endpoint import Request
from rlhf.evaluation.evaluator import ResponseEvaluator
from rlhf.report.rows import per_prompt
from tests.helpers.llm_judges import GOOD_ANSWERS, PROMPTS, make_llm_pool, prefers_good, shown_outputs
from tests.helpers.openai_server import serving, text_of
from tests.helpers.scorer_context import NoSource


def test_the_better_answer_wins_in_either_position_and_both_occur(tmp_path: Path) -> None:
    with serving(prefers_good) as server:
        assert make_llm_pool(server, tmp_path)(PROMPTS, GOOD_ANSWERS) == [1.0] * 40
        first = sum(shown_outputs(request)[0].startswith("good") for request in server.requests)
        assert 8 < first < 32
        assert all("Question" in text_of(request) for request in server.requests)
        assert make_llm_pool(server, tmp_path)(PROMPTS, [f"bad {i}" for i in range(40)]) == [0.0] * 40


def test_a_judge_that_looks_at_the_position_only_is_neutralised(tmp_path: Path) -> None:
    with serving(lambda request, number: "Verdict: 1") as server:
        assert make_llm_pool(server, tmp_path, order="both")(PROMPTS, GOOD_ANSWERS) == [0.5] * 40
        once = make_llm_pool(server, tmp_path)(PROMPTS, GOOD_ANSWERS)
    assert set(once) == {0.0, 1.0}
    assert 0.25 < sum(filter(None, once)) / 40 < 0.75


def test_the_order_depends_on_seed_and_prompt_and_not_on_the_process() -> None:
    code = (
        "from rlhf.evaluation.client import uniform_from_hash as h; print([h(3, 'order', f'Q {i}') for i in range(5)])"
    )
    here = [uniform_from_hash(3, "order", f"Q {i}") for i in range(5)]
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        assert json.loads(done.stdout) == here
    assert here != [uniform_from_hash(4, "order", f"Q {i}") for i in range(5)]
    assert len(set(here)) == 5


def test_annotators_are_drawn_by_weight_or_all_asked(tmp_path: Path) -> None:
    many = [Prompt(f"Q {i}", "reference", f"Question {i}?") for i in range(400)]
    pool = {"a": {"prompt": "compare", "model": "a", "weight": 3.0}, "b": {"prompt": "compare", "model": "b"}}

    def by_model(request: dict[str, Any], number: int) -> str:
        return prefers_good(request) if request["model"] == "a" else "Verdict: draw"

    with serving(by_model) as server:
        outcomes = make_llm_pool(server, tmp_path, pool=pool)(many, ["good"] * 400)
        asked = Counter(request["model"] for request in server.requests)
        assert asked.total() == 400
        assert 260 < asked["a"] < 340  # 300 ± 2 × 20
        assert Counter(outcomes) == {1.0: asked["a"], 0.5: asked["b"]}
        everybody = make_llm_pool(server, tmp_path, pool=pool, vote="all")(many[:5], ["good"] * 5)
        assert everybody == [pytest.approx((3 * 1 + 1 * 0.5) / 4)] * 5
        named = make_llm_pool(
            server, tmp_path, models={"weak": "b"}, pool={"x": {"prompt": "compare", "model": "weak"}}
        )
        assert named(many[:3], ["good"] * 3) == [0.5] * 3


MALFORMED = [
    "I cannot say.",
    "Verdict: 1\nVerdict: 2",
    "Verdict: 3",
    "",
    (200, "{not json"),
    (200, "null"),
    (200, {"id": "x", "object": "chat.completion", "choices": []}),
    (200, {"choices": [{"message": {"role": "assistant", "content": None}}]}),
    (200, [1, 2]),
]


@pytest.mark.parametrize("bad", MALFORMED, ids=str)
def test_unparsable_answers_are_counted_and_asked_again_but_never_scored(tmp_path: Path, bad: Any) -> None:
    def half(request: dict[str, Any], number: int) -> Any:
        if "Question 1?" in text_of(request):
            return bad
        return bad if request["temperature"] == 0.0 else prefers_good(request)

    with serving(half) as server:
        judge = make_llm_pool(server, tmp_path, attempts=3, reask_temperature=0.9)
        outcomes = judge(PROMPTS[:4], GOOD_ANSWERS[:4])
        assert outcomes == [1.0, None, 1.0, 1.0]
        assert (
            judge.report["judge/unparsable"] == 3 + 3
        )  # one bad answer for each of three prompts, three for the fourth
        assert judge.report["judge/unjudged"] == 1
        assert Counter(request["temperature"] for request in server.requests) == {0.0: 4, 0.9: 5}
        metrics, records = ResponseEvaluator(NoSource(), judge)(PROMPTS[:4], GOOD_ANSWERS[:4])
    assert metrics["eval/win_rate"] == 1.0
    assert [record["win"] for record in records] == outcomes
    kept = per_prompt({"win": outcomes}, "eval/win_rate")
    assert kept is not None
    assert [x == x for x in kept.tolist()] == [True, False, True, True]


def test_nothing_is_reported_if_no_answer_can_be_parsed(tmp_path: Path) -> None:
    with (
        serving(lambda request, number: "no idea") as server,
        pytest.raises(ConfigError, match=r"of 4 answers, each asked 2 times, not one could be read"),
    ):
        make_llm_pool(server, tmp_path, attempts=2)(PROMPTS[:4], GOOD_ANSWERS[:4])


def test_the_cache_knows_all_that_determines_an_answer_and_nothing_else(tmp_path: Path) -> None:
    with serving(prefers_good) as server:
        for keys, new in [
            ({}, 4),
            ({}, 0),
            ({"client": {"concurrency": 2, "timeout": 9.0}, "price": {"input": 1.0}}, 0),
            ({"model": "other"}, 4),
            ({"sampling": {"temperature": 0.0, "max_tokens": 7}}, 4),
            ({"seed": 1, "order": "both"}, 4),  # the order drawn before is in the cache, the other one is new
        ]:
            before = len(server.requests)
            judge = make_llm_pool(server, tmp_path, **keys)
            assert judge(PROMPTS[:4], GOOD_ANSWERS[:4]) == [1.0] * 4
            assert len(server.requests) - before == new, keys
            assert judge.report["judge/from_cache"] == judge.report["judge/answers"] - new


def test_tokens_and_cost_are_added_up(tmp_path: Path) -> None:
    with serving(prefers_good) as server:
        keys: dict[str, Any] = {"price": {"input": 2.0, "output": 8.0}}
        judge = make_llm_pool(server, tmp_path, **keys)
        judge(PROMPTS[:10], GOOD_ANSWERS[:10])
        cost = 10 * (10 * 2 + 5 * 8) / 1e6
        assert judge.report["judge/input_tokens"] == 100
        assert judge.report["judge/output_tokens"] == 50
        assert judge.report["judge/cost"] == judge.report["judge/paid"] == pytest.approx(cost)
        judge(PROMPTS[:10], GOOD_ANSWERS[:10])
        assert judge.report["judge/cost"] == pytest.approx(cost)
        assert judge.report["judge/paid"] == 0


def test_concurrency_limits_simultaneous_requests(tmp_path: Path) -> None:
    with serving(prefers_good, seconds=0.05) as server:
        make_llm_pool(server, tmp_path, client={"concurrency": 4})(PROMPTS[:16], GOOD_ANSWERS[:16])
        assert server.most == 4


def test_two_processes_share_a_cache(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from rlhf.evaluation.client import ChatClient;"
        "from rlhf.evaluation.client_settings import ClientSettings; from rlhf.evaluation.endpoint import Request;"
        "client = ChatClient(ClientSettings(sys.argv[1], None), Path(sys.argv[2]), 'key');"
        "asked = [Request('m', [{'role': 'user', 'content': f'{i}'}], str.strip) for i in range(40)];"
        "print(client.ask_all(asked) == [f'said {i}' for i in range(40)])"
    )
    with serving(lambda request, number: f"said {text_of(request)}") as server:
        command = [sys.executable, "-c", code, server.url, str(tmp_path)]
        both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        assert [process.communicate()[0].strip() for process in both] == ["True", "True"]
        client = ChatClient(ClientSettings(server.url, None), tmp_path, "key")
        before = len(server.requests)
        asked = [Request("m", [{"role": "user", "content": f"{i}"}], str.strip) for i in range(40)]
        assert client.ask_all(asked) == [f"said {i}" for i in range(40)]
        assert len(server.requests) == before


def test_a_prompt_without_a_reference_is_not_judged_and_the_others_are(tmp_path: Path) -> None:
    rows = [PROMPTS[0], Prompt("Q", "", "Question?"), PROMPTS[1]]
    with serving(prefers_good) as server:
        metrics, records = ResponseEvaluator(NoSource(), make_llm_pool(server, tmp_path))(rows, GOOD_ANSWERS[:3])
        assert len(server.requests) == 2
    assert [record["win"] for record in records] == [1.0, None, 1.0]
    assert metrics["eval/win_rate"] == 1.0


def test_random_outcomes_give_a_win_rate_with_its_standard_error(tmp_path: Path) -> None:
    with serving(
        lambda request, number: random.Random(text_of(request)).choice(["Verdict: 1", "Verdict: draw"])
    ) as server:
        metrics, records = ResponseEvaluator(NoSource(), make_llm_pool(server, tmp_path))(PROMPTS, GOOD_ANSWERS)
    wins = [record["win"] for record in records]
    assert metrics["eval/win_rate"] == pytest.approx(sum(wins) / 40)
    mean = sum(wins) / 40
    assert metrics["eval/win_rate_se"] == pytest.approx((sum((x - mean) ** 2 for x in wins) / 39 / 40) ** 0.5)
    assert metrics["judge/answers"] == 40
