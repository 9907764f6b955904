"""Simulated preferences through the command: a whole run, the cache, and mistakes found before a run starts."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.data.farm import Farm
from rlhf.files import read_lines
from rlhf.tracking.metrics_file import read_metrics
from rlhf.tracking.summary import read_summary
from tests.helpers.command_line import TINY, error_sentence, run_in_process
from tests.helpers.composed_config import composed_plan

# so small a model makes no sense: one of its answers is better than another only by where it ends
FARM = ["preferences=simulated", "preferences.pairs=30", "preferences.max_new_tokens=40"]


def cached(stage: str) -> list[Path]:
    return sorted(path.parent for path in Path("outputs/cache").glob(f"{stage}-*/summary.json"))


@pytest.mark.long
def test_the_reward_model_learns_from_answers_that_the_farm_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_in_process(*TINY, *FARM, "stage=preferences", "name=made") == 0
    assert not cached("reward")
    (folder,) = cached("preferences")
    summary = read_summary(folder)
    assert summary is not None
    metrics, farm = summary["metrics"], Farm(people=12, comparisons=120)
    assert read_metrics(folder)[0]["preferences/pairs"] == metrics["preferences/pairs"] == 30
    assert (tmp_path / "outputs/made" / next((tmp_path / "outputs/made").iterdir()) / "preference.jsonl").exists()
    for split, prefix, prompts in (
        ("preference", "", set(farm.load("preference")["prompt"])),
        ("preference_validation", "validation_", set(farm.load("preference_validation")["prompt"])),
    ):
        pairs, rows = read_lines(folder / f"{split}_pairs.jsonl"), read_lines(folder / f"{split}.jsonl")
        kept = [pair for pair in pairs if not pair["dropped"]]
        assert metrics[f"preferences/{prefix}comparisons"] == len(rows) == len(kept) > 0
        assert sum(pair["flipped"] for pair in kept) == (0 if prefix else metrics["preferences/flipped"])
        assert {pair["prompt"] for pair in pairs} <= prompts
        for pair, row in zip(kept, rows, strict=True):
            lead = farm.utility(row["prompt"], row["chosen"]) - farm.utility(row["prompt"], row["rejected"])
            assert lead < 0 if pair["flipped"] else lead > 0
    assert metrics["preferences/flipped"] > 0

    before = (folder / "preference_pairs.jsonl").read_bytes()
    shutil.rmtree(folder)
    assert run_in_process(*TINY, *FARM, "stage=reward") == 0
    assert (folder / "preference_pairs.jsonl").read_bytes() == before
    (reward,) = cached("reward")
    learned = read_summary(reward)
    assert learned is not None
    assert learned["preferences"] == folder.name
    assert learned["rows"]["preference"] == metrics["preferences/comparisons"]
    assert 0 <= learned["metrics"]["reward/accuracy"] <= 1

    assert run_in_process(*TINY, *FARM, "preferences.flip=0", "stage=reward") == 0
    assert [len(cached(stage)) for stage in ("sft", "preferences", "reward")] == [1, 2, 2]
    clean = next(path for path in cached("preferences") if path != folder)
    assert (read_summary(clean) or {})["metrics"]["preferences/flipped"] == 0
    unflipped = [{**pair, "flipped": False} for pair in read_lines(folder / "preference_pairs.jsonl")]
    for pair, again in zip(unflipped, read_lines(clean / "preference_pairs.jsonl"), strict=True):
        assert {**pair, "preferred": again["preferred"]} == again  # the same answers and verdicts


def test_what_is_cached_depends_on_the_preferences_only_where_they_are_used(tmp_path: Path) -> None:
    def needed(*overrides: str) -> list[str]:
        return [folder.name for folder in composed_plan(tmp_path, "debug=quick", *overrides).needed().values()]

    sft, reward = needed()
    assert needed("scorer=gold", "preferences=simulated") == [sft]
    same_sft, comparisons, other_reward = needed("preferences=simulated")
    assert (same_sft, comparisons.partition("-")[0]) == (sft, "preferences")
    assert other_reward != reward
    pool = ["preferences=simulated", "judge@preferences.judge=llm_pool", "preferences.judge.model=some"]
    asked = needed(*pool)
    assert asked[1] != comparisons
    assert needed(*pool, "preferences.judge.client.concurrency=1") == asked


REFUSED = [
    (["preferences=nope"], "preferences=nope", "from_data, simulated"),
    (["preferences=null"], "preferences=null: preferences is a config group", "from_data, simulated"),
    (["preferences=simulated", "preferences.flip=1.5"], "preferences.flip=1.5", "from 0 to 1"),
    (["preferences=simulated", "preferences.temperature=0"], "preferences.temperature=0", "above 0"),
    (["preferences=simulated", "preferences.pairs=0"], "preferences.pairs=0", "above 0, or null"),
    (["preferences=simulated", "preferences.ties=keep"], "preferences.ties=keep", "drop or random"),
    (["preferences=simulated", "preferences.split=eval"], "preferences.split=eval", "preference, prompts or sft"),
    (["preferences=simulated", "preferences.nope=1"], "preferences.nope", "temperature"),
    (["preferences.flip=0.1"], "preferences.flip", ""),
    (["preferences=simulated", "judge@preferences.judge=reward_model"], "preferences.judge", "gold, llm_pool"),
    (["preferences=simulated", "judge@preferences.judge=none"], "preferences.judge=none", "llm_pool"),
    (
        ["preferences=simulated", "judge@preferences.judge=finished_reward_model", "preferences.judge.folder=nowhere"],
        "rlhf: preferences.judge.folder=nowhere", "no such folder",
    ),
    (["judge=finished_reward_model", "judge.folder=nowhere"], "rlhf: judge.folder=nowhere", "no such folder"),
    (["preferences=simulated", "preferences.judge=null"], "preferences.judge", "judge"),
    (["preferences=simulated", "judge@preferences.judge=llm_pool"], "preferences.judge.model", "no value"),
    (
        ["preferences=simulated", "judge@preferences.judge=llm_pool", "preferences.judge.model=some",
         "preferences.judge.client.api_key_env=NO_SUCH_KEY"],
        "rlhf: preferences.judge.client.api_key_env=NO_SUCH_KEY", "null",
    ),
    (
        ["preferences=simulated", "preferences.split=prompts", "preferences.validation_pairs=100000"],
        "the split prompts", "preferences.validation_pairs=100000",
    ),
    (["preferences=simulated", "data=alpaca", "judge=none"], "preferences.judge=gold", "data=farm"),
    (["stage=preferences"], "stage=preferences", "preferences=simulated"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "names", "allowed"), REFUSED, ids=[" ".join(row[0]) for row in REFUSED])
def test_a_mistake_is_one_sentence_before_anything_is_built(
    command: Callable, arguments: list[str], names: str, allowed: str
) -> None:
    code, _, err = command("debug=quick", *arguments)
    assert code == 2, err
    said = error_sentence(err)
    assert names in said
    assert allowed in said
    assert not list(Path().rglob("*.safetensors"))
