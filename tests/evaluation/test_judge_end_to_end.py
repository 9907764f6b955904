"""`rlhf judge=llm_pool` and `evaluation=factscore` through the command, with an endpoint that breaks down."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.farm import Farm
from rlhf.files import read_lines
from rlhf.tracking.summary import read_summary
from tests.helpers.openai_server import serving, text_of

QUICK = [
    "debug=quick",
    "ppo.checkpoint_every=50",
    "model.config.num_hidden_layers=1",
    "model.config.hidden_size=32",
    "data=farm",
]


def rlhf(folder: Path, *overrides: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "rlhf", f"output_dir={folder}/outputs", *QUICK, *overrides],
        cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, "MY_KEY": "sk-very-secret"},
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.long
def test_a_run_stops_with_its_endpoint_and_continues_with_the_same_command(tmp_path: Path) -> None:
    working = False

    def respond(request: dict[str, Any], number: int) -> Any:
        # 8 prompts at step 0; at step 1, where no checkpoint is due, it breaks down
        return "Verdict: 1" if working or number <= 8 else (503, {"error": {"message": "out of order"}})

    with serving(respond) as server:
        command = [
            "judge=llm_pool", "judge.model=some", f"judge.client.base_url={server.url}",
            "judge.client.api_key_env=MY_KEY", "judge.client.retries=1", "judge.client.concurrency=1",
            "ppo.eval_every=1", "ppo.lr=0.01", "judge.price={input: 1.0, output: 2.0}",
        ]  # fmt: skip
        said = rlhf(tmp_path, *command, code=75)
        assert "answers 503 after 1 retries; what was judged is kept, and the same command continues" in said
        assert "Traceback" not in said
        working, before = True, len(server.requests)
        assert "continuing from step 1" in rlhf(tmp_path, *command)
        folder = next((tmp_path / "outputs/rlhf").glob("*/summary.json")).parent
        known = {text_of(request) for request in server.requests[:8]}
        assert len(server.requests) - before == len({text_of(r) for r in server.requests[before:]} - known) <= 16
    summary = read_summary(folder)
    assert summary is not None
    metrics = summary["metrics"]
    outcomes = [line for line in read_lines(folder / "outcomes.jsonl") if line["step"] == 2]
    assert len(outcomes) == 1
    assert metrics["eval/win_rate"] == sum(outcomes[0]["win"]) / 8
    assert 0 <= metrics["eval/length_adjusted_win_rate"] <= 1
    assert metrics["judge/cost"] == pytest.approx(8 * (10 * 1 + 5 * 2) / 1e6)
    exported = json.loads((folder / "alpaca_eval.json").read_text())
    reference = json.loads((folder / "alpaca_eval_reference.json").read_text())
    assert len(exported) == len(reference) == 8
    assert set(exported[0]) == set(reference[0]) == {"dataset", "instruction", "output", "generator"}
    samples = {row["prompt"].strip(): row for row in read_lines(folder / "samples.jsonl") if row["step"] == 2}
    for ours, theirs in zip(exported, reference, strict=True):
        assert ours["instruction"] == theirs["instruction"]
        assert ours["output"] == samples[ours["instruction"]]["response"]
        assert theirs["output"] == samples[ours["instruction"]]["reference_output"]
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"sk-very-secret" not in path.read_bytes(), path


@pytest.mark.long
def test_factscore_on_people_of_the_farm(tmp_path: Path) -> None:
    farm = Farm(people=48)
    people = farm.world.people[:6]
    rows = [{"entity": person.name, "text": farm.reference(f"Introduce {person.name}.\n")} for person in people]
    (tmp_path / "people.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def respond(request: dict[str, Any], number: int) -> str:
        asked = request["messages"][-1]["content"]
        if asked.startswith("The sentence"):
            return "- " + asked.rpartition("Sentence: ")[2]
        fact = re.findall(r"Statement: (.*)\n", asked)[0]
        return str(fact in asked.partition("Statement: ")[0])

    with serving(respond) as server:
        scored = "evaluation.factscore"
        rlhf(
            tmp_path, "stage=evaluate", "evaluation=factscore", f"{scored}.model=some",
            f"{scored}.entities=people.jsonl",
            f'{scored}.prompt="Introduce {{entity}}.\\n"', f"{scored}.client.base_url={server.url}",
            f"{scored}.client.api_key_env=null", "sft.epochs=0.5",
        )  # fmt: skip
        assert (
            len(server.requests) >= 2
        )  # at least one sentence split and one fact checked: so small a model says little
    summary = read_summary(next((tmp_path / "outputs/rlhf").glob("*/summary.json")).parent)
    assert summary is not None
    metrics = summary["metrics"]
    assert 0 <= metrics["eval/factscore"] <= metrics["eval/factual_precision"] <= 1
    assert 0 < metrics["eval/responding_ratio"] <= 1
    assert "eval/win_rate" not in metrics


@pytest.mark.long
def test_what_is_missing_is_said_before_anything_is_built(tmp_path: Path) -> None:
    said = rlhf(tmp_path, "judge=llm_pool", "judge.model=some", "judge.client.api_key_env=NO_SUCH_KEY", code=2)
    assert "rlhf: judge.client.api_key_env=NO_SUCH_KEY: $NO_SUCH_KEY is not set" in said
    assert "Traceback" not in said
    assert not (tmp_path / "outputs/cache").exists()
