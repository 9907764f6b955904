"""OpenAI-compatible endpoints: outages, rate limits, refusals, and API keys that must not be shown."""

import threading
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import ConfigError, Interrupted
from tests.helpers.llm_judges import GOOD_ANSWERS, PROMPTS, make_llm_pool, prefers_good
from tests.helpers.openai_server import serving, text_of


def test_errors_and_rate_limits_are_retried(tmp_path: Path) -> None:
    def shaky(request: dict[str, Any], number: int) -> Any:
        return (429 if number % 2 else 500, {"error": {"message": "later"}}) if number <= 4 else prefers_good(request)

    with serving(shaky) as server:
        judge = make_llm_pool(server, tmp_path, client={"concurrency": 1, "retries": 4})
        assert judge(PROMPTS[:3], GOOD_ANSWERS[:3]) == [1.0] * 3
        assert len(server.requests) == 4 + 3


@pytest.mark.parametrize("failure", ["status", "timeout", "refused"])
def test_an_outage_ends_in_a_sentence_and_the_rest_is_asked_later(tmp_path: Path, failure: str) -> None:
    gate = threading.Event()

    def breaks(request: dict[str, Any], number: int) -> Any:
        if number <= 7 or gate.is_set():
            return prefers_good(request)
        if failure == "timeout":
            gate.wait(2)
        return 503, {"error": {"message": "out of order"}}

    options = {
        "concurrency": 1,
        "retries": 1,
        "timeout": 0.3,
        "name": "own",
    }  # the cache identifies it by its name at either address
    with serving(breaks) as server:
        judge = make_llm_pool(server, tmp_path, client=options)
        if failure == "refused":
            assert judge(PROMPTS[:7], GOOD_ANSWERS[:7]) == [1.0] * 7
    if failure == "refused":
        with pytest.raises(Interrupted, match=r"gives no answer .* the same command continues"):
            judge(PROMPTS, GOOD_ANSWERS)
    with serving(breaks) as server:
        judge = make_llm_pool(server, tmp_path, client=options)
        if failure != "refused":
            said = "answers 503" if failure == "status" else "gives no answer"
            with pytest.raises(Interrupted, match=rf"{said}.* after 1 retries; what was judged is kept"):
                judge(PROMPTS, GOOD_ANSWERS)
            assert len(server.requests) == 7 + 2
        gate.set()
        again = make_llm_pool(server, tmp_path, client=options)
        before = len(server.requests)
        assert again(PROMPTS, GOOD_ANSWERS) == [1.0] * 40
        assert len(server.requests) - before == 33
        assert again.report["judge/from_cache"] == 7


def test_a_refused_request_is_not_retried_and_no_key_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_JUDGE_KEY", "sk-very-secret")

    def refuses(request: dict[str, Any], number: int) -> Any:
        return 401, {"error": {"message": "no model some for the key sk-very-secret"}}

    with serving(refuses) as server:
        with pytest.raises(ConfigError, match="refuses some") as caught:
            make_llm_pool(server, tmp_path, client={"api_key_env": "MY_JUDGE_KEY", "concurrency": 1})(
                PROMPTS[:5], GOOD_ANSWERS[:5]
            )
        assert len(server.requests) == 1
        sent = {name.lower(): value for name, value in server.headers[0].items()}
        assert sent["authorization"] == "Bearer sk-very-secret"
    assert "sk-very-secret" not in str(caught.value)
    with serving(prefers_good) as server:
        make_llm_pool(server, tmp_path, client={"api_key_env": "MY_JUDGE_KEY"})(PROMPTS[:2], GOOD_ANSWERS[:2])
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"Verdict" in written
    assert b"sk-very-secret" not in written


ONE_REFUSED: list[Any] = [
    (400, {"error": {"message": "filtered", "code": "content_filter"}}),
    (400, {"error": {"message": "maximum context length is 512 tokens", "param": "max_tokens"}}),
    (403, {"error": {"message": "your input was flagged"}}),
    (413, {"error": {"message": "too large"}}),
    (413, "<html>too large</html>"),
    (422, {"detail": "unprocessable"}),
    (200, {"error": {"message": "filtered", "code": 400}}),
    (200, {"choices": [{"finish_reason": "content_filter", "message": {"content": "Verdict: 1"}}]}),
    (200, {"choices": [{"finish_reason": "stop", "message": {"content": None, "refusal": "I will not."}}]}),
]


@pytest.mark.parametrize("refusal", ONE_REFUSED, ids=str)
def test_a_refused_pair_is_counted_and_the_run_goes_on(
    tmp_path: Path, refusal: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def picky(request: dict[str, Any], number: int) -> Any:
        return refusal if "Question 1?" in text_of(request) else prefers_good(request)

    with serving(picky) as server:
        for asked in (8, 1):  # once more on resuming, when all others come from the cache
            before = len(server.requests)
            judge = make_llm_pool(
                server, tmp_path, sampling={"temperature": 0.0, "max_tokens": 9}, client={"concurrency": 1}
            )
            assert judge(PROMPTS[:8], GOOD_ANSWERS[:8]) == [1.0, None, *[1.0] * 6]
            assert (judge.report["judge/refused"], judge.report["judge/unjudged"]) == (1, 1)
            assert len(server.requests) - before == asked
    assert "judge.client: refused 1 of 8 questions" in caplog.text


def test_if_all_is_refused_the_run_ends(tmp_path: Path) -> None:
    with serving(lambda request, number: (400, {"error": {"message": "filtered"}})) as server:
        judge = make_llm_pool(server, tmp_path, client={"concurrency": 1})
        with pytest.raises(ConfigError, match=r"refuses all of 20 requests: .*filtered"):
            judge(PROMPTS, GOOD_ANSWERS)
        with pytest.raises(ConfigError, match="refuses all of 3 requests"):
            make_llm_pool(server, tmp_path)(PROMPTS[:3], GOOD_ANSWERS[:3])


@pytest.mark.parametrize(
    "refusal",
    [(401, {"error": {"message": "key"}}), (403, {"error": {"message": "country"}}),
     (404, {"error": {"message": "no"}}), (400, {"error": {"message": "invalid", "code": "model_not_found"}})],
)  # fmt: skip
def test_what_concerns_every_request_ends_the_run_at_once(tmp_path: Path, refusal: Any) -> None:
    with serving(lambda request, number: prefers_good(request) if number < 5 else refusal) as server:
        with pytest.raises(ConfigError, match="refuses some"):
            make_llm_pool(server, tmp_path, client={"concurrency": 1})(PROMPTS, GOOD_ANSWERS)
        assert len(server.requests) == 5


def test_a_judge_that_takes_one_temperature_is_asked_again_at_it(tmp_path: Path) -> None:
    def fixed(request: dict[str, Any], number: int) -> Any:
        if request.get("temperature", 1) != 1:
            return 400, {"error": {"message": "Unsupported value: 'temperature'", "param": "temperature"}}
        return "Well." if number == 1 else prefers_good(request)

    with serving(fixed) as server:
        judge = make_llm_pool(server, tmp_path, sampling={"temperature": None}, client={"concurrency": 1})
        assert judge(PROMPTS[:4], GOOD_ANSWERS[:4]) == [1.0] * 4
        assert [request.get("temperature") for request in server.requests] == [None, 0.7, *[None] * 4]
        with pytest.raises(
            ConfigError, match=r"judge.sampling.temperature=0.0 is refused by some: .*null leaves it out"
        ):
            make_llm_pool(server, tmp_path)(PROMPTS, GOOD_ANSWERS)


def test_an_answer_in_parts_is_read_and_a_key_in_it_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_JUDGE_KEY", "sk-very-secret")
    parts = [{"type": "thinking", "thinking": "Verdict: 2"}, {"type": "text", "text": "sk-very-secret\nVerdict: draw"}]
    body = {"choices": [{"finish_reason": "stop", "message": {"role": "assistant", "content": parts}}]}
    with serving(lambda request, number: (200, body)) as server:
        assert (
            make_llm_pool(server, tmp_path, client={"api_key_env": "MY_JUDGE_KEY"})(PROMPTS[:2], GOOD_ANSWERS[:2])
            == [0.5] * 2
        )
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"Verdict" in written
    assert b"sk-very-secret" not in written


def test_a_key_is_hidden_before_a_message_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_JUDGE_KEY", "sk-very-secret")
    for filler in range(200, 300, 7):
        said = {"error": {"message": "x" * filler + "sk-very-secret"}}
        with (
            serving(lambda request, number, said=said: (401, said)) as server,
            pytest.raises(ConfigError) as caught,
        ):
            make_llm_pool(server, tmp_path, client={"api_key_env": "MY_JUDGE_KEY"})(PROMPTS[:1], GOOD_ANSWERS[:1])
        assert "sk-" not in str(caught.value)


def test_another_endpoint_is_not_answered_from_the_cache_of_the_first(tmp_path: Path) -> None:
    with serving(lambda request, number: "Verdict: draw") as first, serving(prefers_good) as second:
        assert make_llm_pool(first, tmp_path)(PROMPTS[:4], GOOD_ANSWERS[:4]) == [0.5] * 4
        assert make_llm_pool(second, tmp_path)(PROMPTS[:4], GOOD_ANSWERS[:4]) == [1.0] * 4
        assert len(second.requests) == 4
