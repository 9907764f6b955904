"""Runs of the methods beside PPO: what decides them, what they leave, and that everything that follows takes them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from rlhf.files import KEPT, METRICS, MODEL, OUTCOMES, SAMPLES, SUMMARY, read_lines, read_object
from rlhf.finished.export import cli as export
from rlhf.finished.policies import open_policy
from rlhf.pipeline import run
from rlhf.pipeline.plan import Plan
from rlhf.policy_settings import METHODS
from rlhf.tracking import evaluations
from tests.helpers.command_line import TINY, run_in_process
from tests.helpers.composed_config import composed_plan
from tests.helpers.run_results import assert_identical, collect_run_results, without_times

BESIDE = [method for method in METHODS if method != "ppo"]


# -- what decides a run ------------------------------------------------------------------------------------------------

OTHERS = {
    "ppo": ["dpo.beta=1", "dpo.steps=7", "best_of_n.n=3", "expert_iteration.rounds=2"],
    "dpo": ["ppo.steps=7", "ppo.lr=1", "kl.coef=3", "divergence=none", "best_of_n.n=3", "scorer=gold", "reward.lr=1",
            "lora@reward.lora=r8", "dpo.eval_every=7", "dpo.keep_evaluated=true", "judge=none", "dpo.log_every=9"],
    "best_of_n": ["ppo.steps=7", "kl=adaptive", "divergence=none", "dpo.beta=1", "expert_iteration.rounds=2",
                  "best_of_n.eval_every=7"],
    "expert_iteration": ["best_of_n.n=3", "expert_iteration.keep_evaluated=true", "ppo.lr=1"],
    "evaluate": ["dpo.beta=1", "best_of_n.n=3"],
}  # fmt: skip
OWN = {
    "ppo": ["ppo.steps=7"],
    "dpo": ["dpo.steps=7", "dpo.beta=1", "dpo.keep_best=null", "seed=3", "lora=r16", "generation.temperature=0.5",
            "sft.lr=1", "data.label_noise=0.3", "preferences=simulated", "reward.max_length=40"],
    "best_of_n": ["best_of_n.n=3", "scorer=gold", "reward.lr=1", "generation.temperature=0.5", "lora=r16"],
    "expert_iteration": ["expert_iteration.rounds=2", "scorer=gold"],
}  # fmt: skip


@pytest.mark.parametrize(("stage", "key"), [(stage, key) for stage, keys in OTHERS.items() for key in keys])
def test_keys_of_other_methods_are_no_part_of_a_run(tmp_path: Path, stage: str, key: str) -> None:
    assert composed_plan(tmp_path, f"stage={stage}", key).identity == composed_plan(tmp_path, f"stage={stage}").identity


@pytest.mark.parametrize(("stage", "key"), [(stage, key) for stage, keys in OWN.items() for key in keys])
def test_what_changes_a_result_is_part_of_a_run(tmp_path: Path, stage: str, key: str) -> None:
    assert composed_plan(tmp_path, f"stage={stage}", key).identity != composed_plan(tmp_path, f"stage={stage}").identity


def test_methods_are_different_runs_from_the_same_models(tmp_path: Path) -> None:
    plans = [composed_plan(tmp_path, f"stage={stage}") for stage in METHODS]
    assert len({plan.identity for plan in plans}) == len(METHODS)
    assert len({json.dumps({name: str(path) for name, path in plan.needed().items()}) for plan in plans}) == 1


def test_without_a_reward_model_dpo_trains_none(tmp_path: Path) -> None:
    assert list(composed_plan(tmp_path, "stage=dpo", "scorer=gold").needed()) == ["sft"]
    simulated = composed_plan(tmp_path, "stage=dpo", "scorer=gold", "preferences=simulated")
    assert list(simulated.needed()) == ["sft", "preferences"]


def test_another_scorer_is_another_evaluation_of_the_same_run_of_dpo(tmp_path: Path) -> None:
    def digests(*overrides: str) -> tuple[str, str]:
        plan: Plan = composed_plan(tmp_path, "stage=dpo", *overrides)
        return plan.identity, plan.evaluation

    (same, one), (identity, other), (_, third) = digests(), digests("scorer=gold"), digests("reward.lr=1")
    assert same == identity
    assert len({one, other, third}) == 3
    patient = [digests("dpo.patience=2", *more)[0] for more in ((), ("scorer=gold",), ("judge=reward_model",))]
    assert len(set(patient)) == 3  # there the evaluations decide when it ends


# -- whole runs --------------------------------------------------------------------------------------------------------


def command(folder: Path, stage: str, *overrides: str) -> int:
    """Run the stage at the smallest size with its results in `outputs/<stage>`; returns the exit code."""
    group = [f"{stage}.{key}" for key in ("eval_every=1", "keep_evaluated=true", "lr=0.01")]
    place = [f"output_dir={folder}/outputs", f"hydra.run.dir={folder}/outputs/{stage}"]
    return run_in_process(*TINY, f"stage={stage}", *group, *place, *overrides)


def killed(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of each method beside PPO."""
    folder = tmp_path_factory.mktemp("methods")
    for stage in BESIDE:
        assert command(folder, stage) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", BESIDE)
def test_a_run_leaves_what_one_of_ppo_leaves(workplace: Path, stage: str) -> None:
    folder = workplace / "outputs" / stage
    summary, lines = read_object(folder / SUMMARY), read_lines(folder / METRICS)
    assert [line["step"] for line in lines if "time/evaluate" in line] == [0, 1, 2]
    evaluated = [line for line in lines if "time/evaluate" in line]
    assert {"eval/win_rate", "eval/gold_utility", "eval/reward", "eval/true_kl"} <= evaluated[-1].keys()
    assert evaluated[0]["eval/true_kl"] == pytest.approx(0, abs=1e-6)
    assert evaluated[-1]["eval/true_kl"] > 1e-6
    assert summary["stage"] == stage
    assert summary["best"]["among"] == [1, 2]
    assert summary["sft_metrics"]["eval/true_kl"] == evaluated[0]["eval/true_kl"]
    assert {path.name for path in (folder / KEPT).iterdir()} == {"step-000001", "step-000002"}
    assert (folder / MODEL / "adapter_model.safetensors").exists()
    answers = sorted(path.name for path in (folder / "answers").glob("*"))
    rounds = {"dpo": 0, "best_of_n": 1, "expert_iteration": 2}[stage]
    assert answers == [f"round-{number + 1:03d}.jsonl" for number in range(rounds)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["dpo", "expert_iteration"])
def test_another_judge_measures_the_whole_curve_without_training(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("it trains")

    monkeypatch.setattr(run, "train_policy", fail)
    folder = workplace / "outputs" / stage
    assert command(workplace, stage, "judge=reward_model") == 0
    shown = evaluations.shown_summary(folder)
    assert shown is not None
    place = evaluations.place(folder, shown["evaluation"])
    lines = {line["step"]: line for line in read_lines(place / METRICS) if "time/evaluate" in line}
    own = {line["step"]: line for line in read_lines(folder / METRICS) if "time/evaluate" in line}
    assert sorted(lines) == [0, 1, 2]
    for step in lines:
        assert lines[step]["eval/true_kl"] == pytest.approx(own[step]["eval/true_kl"], rel=1e-4, abs=1e-7)
        assert lines[step]["eval/reward"] == pytest.approx(own[step]["eval/reward"], rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("stage", BESIDE)
def test_a_run_killed_after_its_last_evaluation_is_finished_by_the_same_command(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    shutil.copytree(workplace / "outputs" / "cache", tmp_path / "outputs" / "cache", ignore=lambda *_: ["runs"])
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_summary", killed)
        assert command(tmp_path, stage) == 130
    assert command(tmp_path, stage) == 0
    first, second = (collect_run_results([folder / "outputs" / stage]) for folder in (workplace, tmp_path))
    assert_identical(second, first)


@pytest.mark.long
def test_a_measurement_that_was_killed_before_its_summary_leaves_each_line_once(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = [f"output_dir={tmp_path}", f"hydra.run.dir={tmp_path}/measured", "stage=evaluate"]
    shutil.copytree(workplace / "outputs" / "cache", tmp_path / "cache", ignore=lambda *_: ["runs"])

    def lines() -> list[list[dict[str, Any]]]:
        found = [read_lines(tmp_path / "measured" / name) for name in (METRICS, OUTCOMES, SAMPLES)]
        return [[without_times(line) for line in file] for file in found]

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_summary", killed)
        assert run_in_process(*TINY, *place) == 130
    before = lines()
    assert run_in_process(*TINY, *place) == 0
    assert lines() == before
    assert [len(file) for file in before] == [1, 1, 4]


@pytest.mark.slow
def test_finished_runs_are_measured_compared_and_exported(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    place = ["hydra.run.dir=outputs/again", "output_dir=outputs"]
    assert run_in_process("stage=evaluate", "policy=outputs/dpo", "evaluation.prompts=3", *place) == 0
    again = read_object(workplace / "outputs" / "again" / SUMMARY)
    assert again["metrics"]["eval/true_kl"] > 1e-6
    assert open_policy("outputs/dpo").label == "dpo"
    assert open_policy("outputs/dpo@sft").identity() == open_policy("outputs/best_of_n@sft").identity()
    for stage in BESIDE:
        export.main([f"outputs/{stage}", f"exported/{stage}"])
        card = (workplace / "exported" / stage / "README.md").read_text()
        assert f"- {stage}\n" in card  # its tag
        assert f"{stage}:\n" in card  # its settings


@pytest.mark.slow
def test_finished_finds_the_run_of_any_method(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the configuration alone; where there are runs of several methods, the command has to name one."""

    def asked(policy: str, *stages: str) -> int:
        keys = [f"{stage}.{key}" for stage in stages for key in ("eval_every=1", "keep_evaluated=true", "lr=0.01")]
        place = [f"output_dir={workplace}/outputs", f"hydra.run.dir={workplace}/outputs/asked"]
        return run_in_process(*TINY, "stage=evaluate", f"policy={policy}", "resume=never", *keys, *place)

    for stage in BESIDE:
        assert asked("finished", stage) == 0
        own, found = (read_object(workplace / "outputs" / name / SUMMARY)["metrics"] for name in (stage, "asked"))
        assert found["eval/true_kl"] == own["eval/true_kl"]
    for stage in BESIDE:
        assert asked(f"finished@{stage}", *BESIDE) == 0
        assert read_object(workplace / "outputs" / "asked" / SUMMARY)["same_as"] == f"../{stage}"
    assert asked("finished", "dpo", "best_of_n") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "there are finished runs of dpo and best_of_n; allowed: finished@dpo, finished@best_of_n, or" in said
    assert asked("finished@ppo", *BESIDE) == 2
    assert "holds no finished run of this configuration; allowed:" in " ".join(capsys.readouterr().err.split())
    assert asked("finished@orpo") == 2
    assert "policy=finished@orpo: there is no such method; allowed: finished, finished@ppo" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_estimates_every_method(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    for stage in BESIDE:
        assert command(workplace, stage, "seed=7", "dry_run=true") == 0
        plan = OmegaConf.create(capsys.readouterr().out)
        assert list(plan.stages) == [stage]
        assert f" for {stage} (" in plan.stages[stage].memory
        assert plan.stages[stage].time.startswith("about ")
