"""The judge and FActScore against `transformers serve` with a small real model in the folder RLHF_REAL_MODEL."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.data.records import Prompt
from rlhf.evaluation.factscore import FactScore
from rlhf.evaluation.llm_pool import LLMPool
from rlhf.scorers import Context
from tests.helpers.scorer_context import NoSource
from tests.helpers.tiny_models import tiny_roles, word_tokenizer

MODEL = os.environ.get("RLHF_REAL_MODEL", "")
pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.skipif(not MODEL, reason="RLHF_REAL_MODEL is not set")]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    serve = shutil.which("transformers")
    if serve is None:
        pytest.skip("transformers' command is not there")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("server") / "log").open("w")
    server = subprocess.Popen([serve, "serve", MODEL, "--port", str(port), "--device", "cpu"], stdout=log, stderr=log)
    try:
        for _ in range(180):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, Path(log.name).read_text()
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)
        log.close()


def test_a_pool_judges_counts_tokens_and_continues_without_the_server(url: str, tmp_path: Path) -> None:
    keys = {
        "model": MODEL,
        "client": {"base_url": url, "api_key_env": None, "concurrency": 1, "timeout": 120.0},
        "sampling": {"temperature": 0.0, "max_tokens": 24},
        "pool": {"crowd": {"prompt": "crowd"}},
        # a model of this size rarely keeps to a format: take the first number that it names
        "answer": r"(?s)\A\D*?([12])\b",
        "attempts": 2,
    }
    context = Context(NoSource(), word_tokenizer(), tiny_roles(), cache=tmp_path)
    LLMPool.check(keys)
    LLMPool.ping(keys)
    prompts = [
        Prompt(f"{i}", "Water boils at 100 degrees Celsius.", f"At what temperature does water boil? ({i})")
        for i in range(3)
    ]
    judge = LLMPool(context, **keys)
    outcomes = judge(prompts, ["At 100 degrees.", "I like dogs.", "It boils."])
    assert len(outcomes) == 3
    assert set(outcomes) <= {0.0, 1.0, None}
    assert judge.report["judge/input_tokens"] > 3 * 50
    assert judge.report["judge/output_tokens"] > 3
    away = LLMPool(context, **{**keys, "client": {**keys["client"], "base_url": "http://127.0.0.1:9/v1", "retries": 0}})
    assert away(prompts, ["At 100 degrees.", "I like dogs.", "It boils."]) == outcomes
    assert away.report["judge/from_cache"] == judge.report["judge/answers"]
    print(outcomes, judge.report)


def test_facts_are_split_and_checked(url: str, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(
        '{"entity": "Marie Curie", "text": "Marie Curie was born in Warsaw in 1867. She won two Nobel Prizes."}\n'
    )
    client = {"base_url": url, "api_key_env": None, "concurrency": 1}
    keys = {"entities": str(tmp_path / "one.jsonl"), "model": MODEL, "client": client, "attempts": 2}
    FactScore.check(keys)
    scorer = FactScore(tmp_path, sampling={"temperature": 0.0, "max_tokens": 60}, **keys)
    metrics, records = scorer(scorer.prompts(None), ["Marie Curie was born in Warsaw in 1867."])
    assert records[0]["stated"] >= 1
    assert 0 <= metrics["eval/factscore"] <= metrics["eval/factual_precision"] <= 1
    assert metrics["eval/responding_ratio"] == 1
    print(metrics, records)
