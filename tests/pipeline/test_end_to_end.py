"""The whole pipeline through the command: files of a run, the cache, sweeps, resuming, loading the models."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.tracking.metrics_file import read_metrics
from rlhf.tracking.summary import read_summary
from tests.helpers.command_line import run_in_process
from tests.helpers.subprocess_runs import QUICK, run_in_subprocess

pytestmark = pytest.mark.slow
PPO_METRICS = [
    "reward",
    "shaped_reward",
    "penalty",
    "k1",
    "k3",
    "entropy",
    "ratio",
    "clip_fraction",
    "policy_loss",
    "value_loss",
    "explained_variance",
    "response_tokens",
    "missing_eos",
    "grad_norm",
    "lr",
    "rollouts_per_second",
]
EVAL_METRICS = [
    "win_rate",
    "win_rate_se",
    "true_kl",
    "response_tokens",
    "reward",
    "factual_precision",
    "facts_per_response",
    "gold_utility",
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the quick pipeline has run once."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run_in_process(*QUICK, f"output_dir={folder}/outputs") == 0
    return folder


def run_folder(workplace: Path) -> Path:
    return next(path.parent for path in (workplace / "outputs").glob("rlhf/*/summary.json"))


def test_a_run_leaves_what_the_design_names(workplace: Path) -> None:
    folder = run_folder(workplace)
    for name in (".hydra", "metrics.jsonl", "samples.jsonl", "checkpoints", "model"):
        assert (folder / name).exists(), name
    rows = read_metrics(folder)
    assert all("step" in row and "time" in row for row in rows)
    steps = [row["step"] for row in rows if "ppo/reward" in row]
    assert steps == [1, 2]
    for row in rows:
        if "ppo/reward" in row:
            assert {f"ppo/{name}" for name in PPO_METRICS} <= row.keys()
            assert {"time/generate", "time/score", "time/update"} <= row.keys()
            assert row["ppo/first_ratio"] == pytest.approx(1, abs=1e-5)
    evaluations = [row for row in rows if "eval/true_kl" in row]
    assert [row["step"] for row in evaluations] == [0, 2]
    assert all({f"eval/{name}" for name in EVAL_METRICS} <= row.keys() for row in evaluations)
    assert evaluations[0]["eval/true_kl"] == pytest.approx(0, abs=1e-7)
    assert evaluations[1]["eval/true_kl"] > 0
    summary = read_summary(folder)
    assert summary is not None
    assert {"metrics", "config", "versions", "git_commit", "wall_seconds", "peak_memory_bytes"} <= summary.keys()
    assert (workplace / "outputs/cache" / summary["reward_model"] / "summary.json").exists()
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in samples} == {0, 2}
    assert {"prompt", "response", "reference_output", "reward", "win"} <= samples[0].keys()


def test_the_same_command_again_says_it_is_finished_and_repeats_nothing(workplace: Path) -> None:
    before = (run_folder(workplace) / "metrics.jsonl").read_bytes()
    assert "finished already" in run_in_subprocess(workplace, *QUICK)
    assert (run_folder(workplace) / "metrics.jsonl").read_bytes() == before


def test_the_models_load_in_plain_transformers_and_peft(workplace: Path) -> None:
    policy = run_folder(workplace) / "model"
    tokenizer = AutoTokenizer.from_pretrained(policy)
    ids = torch.tensor([tokenizer("Introduce Lilo Kunn.\n")["input_ids"]])
    model = AutoPeftModelForCausalLM.from_pretrained(policy)
    base_folder = json.loads((policy / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    assert not torch.equal(model(ids).logits, base(ids).logits)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base(ids).logits)
    reward = next((workplace / "outputs/cache").glob("reward-*/model"))
    scorer = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=1)
    scores = PeftModel.from_pretrained(scorer, reward)(ids).logits
    assert scores.shape == (1, 1)
    assert scores.abs().item() > 0


@pytest.mark.long
def test_a_sweep_shares_the_stages_and_gives_each_run_a_folder(workplace: Path) -> None:
    cached = {path.name for path in (workplace / "outputs/cache").iterdir() if path.is_dir()}
    run_in_subprocess(workplace, "-m", *QUICK, "name=sweep", "divergence=none,exact_kl", "lora=r8,none", "ppo.steps=1")
    assert {path.name for path in (workplace / "outputs/cache").iterdir() if path.is_dir()} == cached
    summaries = list((workplace / "outputs/sweep").glob("*/summary.json"))
    assert len(summaries) == 4
    configs = {
        (s["config"]["divergence"]["name"], s["config"]["lora"]["r"])
        for s in map(json.loads, map(Path.read_text, summaries))
    }
    assert configs == {("none", 8), ("none", 0), ("exact_kl", 8), ("exact_kl", 0)}


@pytest.mark.long
def test_an_interrupted_run_continues_to_the_same_bits(workplace: Path) -> None:
    arguments = [*QUICK, "ppo.steps=3", "ppo.eval_every=1", "name=straight"]
    run_in_subprocess(workplace, *arguments)
    straight = next((workplace / "outputs/straight").glob("*"))
    # as after a kill behind step 2: no summary, no model, the checkpoint of step 2
    run_in_subprocess(
        workplace, *arguments[:-1], "name=broken", "resume=never"
    )  # otherwise the result of `straight` would be reused
    broken = next((workplace / "outputs/broken").glob("*"))
    for name in ("summary.json", "model/adapter_model.safetensors", "checkpoints/step-000003.ckpt"):
        (broken / name).unlink()
    shutil.rmtree(workplace / "outputs/cache/runs")
    assert "continuing from step 2" in run_in_subprocess(workplace, *arguments[:-1], "name=broken")
    for name in ("model/adapter_model.safetensors",):
        assert (broken / name).read_bytes() == (straight / name).read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("stage", ["sft", "reward", "evaluate"])
def test_each_stage_runs_by_itself(workplace: Path, stage: str) -> None:
    run_in_subprocess(workplace, *QUICK, f"stage={stage}", f"name={stage}")
    summary = read_summary(next((workplace / "outputs" / stage).glob("*")))
    assert summary is not None
    assert summary["stage"] == stage
    expected = {"sft": "sft/perplexity", "reward": "reward/accuracy", "evaluate": "eval/win_rate"}[stage]
    assert expected in summary["metrics"]


@pytest.mark.long
def test_resume_must_fails_in_a_sentence_without_a_checkpoint(workplace: Path) -> None:
    assert "resume=must" in run_in_subprocess(workplace, *QUICK, "name=nothing", "seed=9", "resume=must", code=2)


@pytest.mark.long
def test_gold_and_function_scorers_need_no_reward_model(workplace: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def longest(prompts, responses):\n    return [len(r) / 100 for r in responses]\n"
    )
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from rlhf.cli import main; main()"
    arguments = [*QUICK, f"output_dir={tmp_path}/outputs", "scorer=function", "scorer.function=mine.longest"]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "outputs/cache").glob("reward-*"))


@pytest.mark.long
def test_two_jobs_at_once_and_wandb_offline_without_a_key(workplace: Path) -> None:
    flags = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=1,2", "logger=wandb", "name=pair"]
    run_in_subprocess(workplace, *flags, *QUICK[:1], *QUICK[2:])
    runs = [path.parent for path in (workplace / "outputs/pair").glob("*/summary.json")]
    assert len(runs) == 2
    for run in runs:
        assert list(run.glob("wandb/offline-run-*/run-*.wandb"))
