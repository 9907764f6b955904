"""The checkpoint of the best evaluation: how it is chosen, that it survives kills, and what a run exports of it."""

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from rlhf.data.farm import Farm
from rlhf.data.records import Prompt
from rlhf.distributed.processes import SIGNALS
from rlhf.errors import Interrupted
from rlhf.files import read_json
from rlhf.files.digests import sha256
from rlhf.pipeline.checkpoints import Best, StepCheckpoints, _checksum_file
from rlhf.pipeline.config import settings_of
from rlhf.pipeline.evaluating import best_metric, logged_metrics
from rlhf.pipeline.train_policy import train_policy
from rlhf.report.metric_info import EVAL_METRICS
from rlhf.stages.ppo import PPO
from rlhf.tracking.metrics_file import evaluated_at
from tests.helpers.command_line import TINY
from tests.helpers.composed_config import composed
from tests.helpers.ppo_stages import PROMPTS, make_ppo, ppo_settings
from tests.helpers.run_results import assert_identical
from tests.helpers.training import copy_weights, quiet_trainer


def lines(folder: Path, *values: float | None, torn: str = "") -> None:
    """Metrics of evaluations at steps 0, 10, 20 … after a line of training each; None leaves out the metric."""
    rows = [json.dumps({"step": 10 * i, "eval/win_rate": 0.99, "ppo/reward": 1.0}) for i in range(len(values))]
    for i, value in enumerate(values):
        found = {} if value is None else {"eval/win_rate": value}
        rows.insert(2 * i + 1, json.dumps({"step": 10 * i, **found, "time/evaluate": 1.0}))
    (folder / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows) + torn)


@pytest.mark.parametrize(
    ("values", "mode", "step"),
    [
        ((0.2, 0.3, 0.5, 0.4), "max", 20),
        ((0.2, 0.3, 0.5, 0.4), "min", 10),
        ((0.9, 0.3, 0.5, 0.5), "max", 30),  # step 0 has no checkpoint; among equals the last one wins
        ((0.9, 0.3, 0.3, 0.5), "min", 20),
        ((0.1, math.nan, 0.2, math.inf), "max", 20),
        ((0.1, None, -0.2, None), "min", 20),
        ((0.1, None), "max", None),
        ((0.1,), "max", None),
    ],
)
def test_the_best_evaluation_is_the_last_of_equals(tmp_path: Path, values: tuple, mode: str, step: int | None) -> None:
    lines(tmp_path, *values, torn='{"step": 50, "time/evaluate": 1.0, "eval/win_rate": 0.9')
    assert Best(tmp_path, "eval/win_rate", mode).step() == step


def test_without_evaluations_there_is_no_best_checkpoint(tmp_path: Path) -> None:
    assert Best(tmp_path, "eval/win_rate", "max").step() is None


# win rates at steps 0, 2, 4, 6, 8, 9
VERDICTS = {0: 0.9, 2: 0.3, 4: 0.6, 6: 0.5, 8: 0.6 - 1e-9, 9: 0.1}


@pytest.mark.parametrize(
    ("overrides", "more"),
    [
        (
            [],
            {"eval/entropy", "eval/forward_kl", "eval/facts_known", "eval/facts_lost", "eval/demonstration_perplexity"},
        ),
        (["evaluation.diversity_samples=2"], {f"eval/samples_{name}" for name in ("distinct_1", "distinct_2", "ead")}),
        (["evaluation.texts=x.jsonl"], {"eval/text_perplexity"}),
    ],
)
def test_the_best_policy_may_be_chosen_by_every_metric_that_is_logged(overrides: list[str], more: set[str]) -> None:
    settings = settings_of(composed(*TINY, *overrides)).evaluation
    allowed = logged_metrics(settings, Farm(), judged=True)
    assert more < set(allowed)
    assert set(allowed) <= set(EVAL_METRICS)  # a search may have them as objectives
    bare = settings_of(composed(*TINY, "evaluation.demonstrations=0")).evaluation
    assert not {"eval/demonstration_perplexity", "eval/text_perplexity", "eval/samples_ead"} & set(
        logged_metrics(bare, Farm(), judged=True)
    )
    chosen = composed(*TINY, *overrides, f"ppo.keep_best={max(more)}")
    assert best_metric(chosen, settings_of(chosen), Farm()) == max(more)


def lose_power() -> None:
    raise RuntimeError("the power is gone")


def run(
    folders: SimpleNamespace,
    folder: Path,
    seen: dict[int, dict[str, Tensor]],
    moment: tuple[int, str] | None = None,
    act: Callable[[], None] = lose_power,
) -> PPO:
    """Call `train_policy` on `folder` and `act` at a moment; the policy at each evaluation is put into `seen`."""
    options = {"steps": 9, "eval_every": 2, "checkpoint_every": 5, "epochs": 1, "rollout_batch_size": 6}
    stage = make_ppo(ppo_settings(**options), folders, folder / "samples.jsonl")

    def judge(prompts: Any, responses: Any) -> tuple[dict, list[dict]]:
        if moment == (stage.ppo_step, "evaluation"):
            act()
        seen[stage.ppo_step] = copy_weights(stage.roles)
        return {"eval/win_rate": VERDICTS[stage.ppo_step]}, [{"win": 0.5} for _ in responses]

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        if moment == (stage.ppo_step + 1, "step") and len(prompts) == 6:  # an evaluation has 4
            act()
        return [float(len(response)) for response in responses]

    stage.evaluator, stage.scorer.function = judge, score  # type: ignore[attr-defined]

    folder.mkdir(exist_ok=True)
    evaluation: DataLoader = DataLoader([Prompt(p, "w5") for p in PROMPTS[:4]], batch_size=4, collate_fn=list)  # type: ignore[arg-type]
    train_policy(quiet_trainer, stage, PROMPTS, evaluation, folder, "auto", Best(folder, "eval/win_rate", "max"))
    return stage


def kept(folder: Path) -> list[int]:
    return sorted(StepCheckpoints.step_of(path) for path in folder.glob("checkpoints/*.ckpt"))


def states(folder: Path) -> dict[str, Any]:
    """All checkpoints without Lightning's loop counters, which include interrupted passes."""
    files = sorted(folder.glob("checkpoints/*.ckpt"))
    return {path.name: {**torch.load(path, weights_only=True), "loops": None} for path in files}


def test_the_best_stays_beside_the_newest_through_every_kill(folders: SimpleNamespace, tmp_path: Path) -> None:
    straight: dict[int, dict[str, Tensor]] = {}
    run(folders, tmp_path / "straight", straight)
    assert sorted(straight) == [0, 2, 4, 6, 8, 9]
    assert kept(tmp_path / "straight") == [4, 8, 9]  # saved at 2, 4, 5, 6, 8, 9
    best = StepCheckpoints(
        tmp_path / "straight/checkpoints", 1, best=Best(tmp_path / "straight", "eval/win_rate", "max")
    )
    path = best.sound_best()
    assert path is not None
    state = torch.load(path, weights_only=True)["state_dict"]
    trained = {f"roles.{name}" for name in straight[4]} & state.keys()
    assert len(trained) == len(state) > 8
    assert all(torch.equal(state[name], straight[4][name.removeprefix("roles.")]) for name in trained)
    assert any(not torch.equal(state[name], straight[9][name.removeprefix("roles.")]) for name in trained)

    moments = [(3, "step"), (4, "evaluation"), (7, "step"), (9, "evaluation")]
    for moment in moments:
        with pytest.raises(RuntimeError, match="power"):
            run(folders, tmp_path / "killed", {}, moment)
        if moment[0] >= 7:
            assert 4 in kept(tmp_path / "killed"), moment
    run(folders, tmp_path / "killed", {})
    assert_identical(states(tmp_path / "killed"), states(tmp_path / "straight"))
    assert Best(tmp_path / "killed", "eval/win_rate", "max").step() == 4


def test_a_signal_is_heeded_in_every_evaluation_and_given_back(folders: SimpleNamespace, tmp_path: Path) -> None:
    """Lightning alone would lose a SIGTERM that comes in an evaluation outside of training, and all later ones."""
    before = [signal.getsignal(number) for number in SIGNALS]
    for moment in ((0, "evaluation"), (2, "evaluation"), (3, "step")):
        with pytest.raises(Interrupted, match=f"stopped by SIGTERM after step {moment[0]}"):
            run(folders, tmp_path, {}, moment, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert [signal.getsignal(number) for number in SIGNALS] == before
    assert kept(tmp_path) == [2, 3]
    seen: dict[int, dict[str, Tensor]] = {}
    run(folders, tmp_path, seen)
    assert sorted(seen) == [4, 6, 8, 9]  # the evaluation of step 2 was complete
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_damaged_or_missing_best_is_said_and_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines(tmp_path, 0.1, 0.5, 0.3, 0.2, 0.1)
    checkpoints = StepCheckpoints(tmp_path / "checkpoints", 10, keep=2, best=Best(tmp_path, "eval/win_rate", "max"))
    checkpoints.folder.mkdir()
    for step in (10, 20, 30, 40):
        path = checkpoints.folder / f"step-{step:06d}.ckpt"
        torch.save({"state_dict": {}}, path)
        _checksum_file(path).write_text(sha256(path))
    checkpoints.prune()
    assert kept(tmp_path) == [10, 30, 40]
    path = checkpoints.folder / "step-000010.ckpt"
    assert checkpoints.sound_best() == path
    path.write_bytes(path.read_bytes()[:-1])
    assert checkpoints.sound_best() is None
    path.unlink()
    assert checkpoints.sound_best() is None
    assert [record.message for record in caplog.records] == [f"{path}, the best, is gone or damaged"] * 2
    lines(tmp_path, 0.1, 0.5, 0.3, 0.2, 0.6)
    checkpoints.prune()
    assert kept(tmp_path) == [30, 40]


@pytest.mark.slow
def test_a_run_leaves_its_best_policy_and_says_which(command: Callable, tmp_path: Path) -> None:
    """The lowest KL selects the first step, the highest the last. With an adapter and without."""
    allowed = logged_metrics(settings_of(composed(*TINY)).evaluation, Farm(), judged=True)
    common = [*TINY, f"output_dir={tmp_path}/outputs", "ppo.eval_every=1", "ppo.checkpoint_every=3"]
    least = [*common, "ppo.keep_best=eval/true_kl", "ppo.keep_best_mode=min"]
    for lora, kind, file in (
        ("r8", AutoPeftModelForCausalLM, "adapter_model.safetensors"),
        ("none", AutoModelForCausalLM, "model.safetensors"),
    ):
        assert command(*least, f"lora={lora}", f"name={lora}")[0] == 0
        (folder,) = (tmp_path / "outputs" / lora).iterdir()
        summary = read_json(folder / "summary.json")
        metrics = evaluated_at(folder, 1)
        told = {
            "step": 1,
            "among": [1, 2, 3],
            "metric": "eval/true_kl",
            "value": metrics["eval/true_kl"],
            "metrics": metrics,
        }
        assert summary["best"] == {**told, "model": "model_best"}
        assert summary["metrics"] == evaluated_at(folder, 3)  # the report shows the metrics of the last step
        chosen_by = {name for name in metrics if name.startswith("eval/") and not name.endswith(("_se", "_fall"))}
        assert chosen_by | {"eval/facts_lost"} == set(allowed)  # of a model that knows no fact none can be lost
        saved = torch.load(folder / "checkpoints/step-000001.ckpt", weights_only=True)["state_dict"]
        state, last = load_file(folder / "model_best" / file), load_file(folder / "model" / file)
        assert state.keys() == last.keys()
        assert any(not torch.equal(state[name], last[name]) for name in state)
        policy = [_sum(saved[name]) for name in saved if "policy" in name]
        assert sorted(map(_sum, state.values())) == sorted(policy)
        kind.from_pretrained(folder / "model_best")
    assert command(*common, "ppo.keep_best=eval/true_kl", "name=most")[0] == 0
    (folder,) = (tmp_path / "outputs/most").iterdir()
    best = read_json(folder / "summary.json")["best"]
    assert (best["step"], best["model"]) == (3, "model")
    assert not (folder / "model_best").exists()
    assert command(*least, "name=other")[0] == 0  # the same run under another name
    (folder,) = (tmp_path / "outputs/other").iterdir()
    assert (folder / "model_best/adapter_model.safetensors").exists()
    assert read_json(folder / "summary.json")["best"]["step"] == 1


def _sum(tensor: Tensor) -> float:
    return float(tensor.double().abs().sum())
