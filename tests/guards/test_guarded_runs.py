"""Guards in killed, stopped and resumed runs, and their warnings in the report."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.utils.data import DataLoader

from rlhf import root
from rlhf.data.records import Prompt
from rlhf.errors import GuardStop
from rlhf.files import read_json
from rlhf.pipeline.checkpoints import StepCheckpoints
from rlhf.pipeline.train_policy import train_policy
from rlhf.report.checks import warnings
from rlhf.report.runs import load
from rlhf.settings import GuardsSettings, LimitGuard, Settings
from rlhf.stages.ppo import PPO
from rlhf.tracking.metrics_file import read_metrics
from tests.helpers.guard_settings import scores_bad_at_calls, settings_with_guards, single_guard
from tests.helpers.made_up_sweeps import write_run
from tests.helpers.ppo_stages import PROMPTS, count_low_words, make_ppo
from tests.helpers.run_results import without_times
from tests.helpers.subprocess_runs import QUICK, run_in_subprocess
from tests.helpers.training import changed_weights, copy_weights, quiet_trainer


def whole_run(
    settings: Settings, folders: SimpleNamespace, folder: Path, score: Callable = count_low_words
) -> tuple[PPO, Path]:
    """Call `train_policy` from the start, or from the last checkpoint in `folder`."""
    stage = make_ppo(settings, folders, folder / "samples.jsonl")
    stage.scorer.function = score  # type: ignore[attr-defined]
    stage.evaluator = lambda prompts, responses: ({"eval/win_rate": 0.5}, [{"win": 0.5} for _ in responses])

    folder.mkdir(exist_ok=True)
    rows = [Prompt(prompt, "w5") for prompt in PROMPTS[:4]]
    evaluation: DataLoader = DataLoader(rows, batch_size=4, collate_fn=list)  # type: ignore[arg-type]
    train_policy(quiet_trainer, stage, PROMPTS, evaluation, folder, "auto")
    return stage, folder


@pytest.mark.long
def test_killed_and_resumed_the_guards_decide_the_same(folders: SimpleNamespace, tmp_path: Path) -> None:
    """Windows, counts and start values of the guards survive the kill, those of evaluations too."""
    every = GuardsSettings(
        entropy_rise=LimitGuard("warn", 3, 0.5), spike=LimitGuard("warn", 2, 0.9),
        length_cap=LimitGuard("warn", 4, 0.0), linear_range=LimitGuard("warn", 2, 1.0),
    )  # fmt: skip
    settings = settings_with_guards(every, steps=7, eval_every=2, checkpoint_every=2, epochs=1)
    straight, folder = whole_run(settings, folders, tmp_path / "straight")
    assert {"entropy_rise", "spike"} <= straight.guards.findings.keys()
    calls = 0

    def fail_in_step_six(prompts: list[str], responses: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 8:  # after five steps and three evaluations, in the sixth step
            raise RuntimeError("the power is gone")
        return count_low_words(prompts, responses)

    with pytest.raises(RuntimeError, match="power"):
        whole_run(settings, folders, tmp_path / "killed", fail_in_step_six)
    assert StepCheckpoints.reached(tmp_path / "killed/checkpoints") == 4
    resumed, again = whole_run(settings, folders, tmp_path / "killed")
    expected, found = ([without_times(line) for line in read_metrics(where)] for where in (folder, again))
    assert found == expected
    assert any(key.startswith("guard/") for line in found[-4:] for key in line)
    assert resumed.guards.summary() == straight.guards.summary()
    assert not changed_weights(copy_weights(straight.roles), resumed.roles)


@pytest.mark.long
def test_a_stopped_run_stops_again_until_the_guard_is_milder(folders: SimpleNamespace, tmp_path: Path) -> None:
    options = {"steps": 4, "eval_every": 10, "checkpoint_every": 1, "epochs": 1}
    strict = settings_with_guards(single_guard("large_kl", "stop", 2, 0.0), **options)
    for _ in range(2):
        with pytest.raises(
            GuardStop, match=r"guard large_kl stopped the run at step 2: the KL .* nats per token .limit: 0.; usual"
        ):
            whole_run(strict, folders, tmp_path / "run")
        assert StepCheckpoints.reached(tmp_path / "run/checkpoints") == 2
        assert [line["step"] for line in read_metrics(tmp_path / "run") if "ppo/k1" in line] == [1, 2]
    mild, folder = whole_run(
        settings_with_guards(single_guard("large_kl", "warn", 2, 0.0), **options), folders, tmp_path / "run"
    )
    assert mild.guards.summary()["large_kl"]["count"] == 3
    straight, other = whole_run(settings_with_guards(GuardsSettings(), **options), folders, tmp_path / "straight")
    assert not changed_weights(copy_weights(straight.roles), mild.roles)
    steps = [[line["step"] for line in read_metrics(where) if "ppo/reward" in line] for where in (folder, other)]
    assert steps[0] == steps[1] == [1, 2, 3, 4]


def test_always_nan_stops_with_a_sound_checkpoint(folders: SimpleNamespace, tmp_path: Path) -> None:
    settings = settings_with_guards(single_guard("non_finite", "warn", 2), steps=9, checkpoint_every=1, epochs=1)
    with pytest.raises(GuardStop, match="a reward was NaN or infinite, so updates were skipped in 2 steps in a row"):
        whole_run(settings, folders, tmp_path / "run", scores_bad_at_calls(*range(3, 99), rows=slice(None)))
    last = StepCheckpoints(tmp_path / "run/checkpoints", 1).latest()
    assert last is not None
    assert StepCheckpoints.step_of(last) == 3  # call 1 was the evaluation of step 0
    stage = make_ppo(settings, folders, tmp_path / "samples")
    before = copy_weights(stage.roles)
    stage.load_trained(last)
    assert changed_weights(before, stage.roles)
    assert all(bool(p.isfinite().all()) for p in stage.roles.parameters())
    assert len(list((tmp_path / "run/inspect").glob("*.safetensors"))) == 2


@pytest.mark.long
def test_the_command_stops_with_its_own_exit_code_and_leaves_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "def score(prompts, responses):\n    return [float('nan') if len(r) else 0.0 for r in responses]\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{root()}")
    arguments = [*QUICK, "scorer=function", "scorer.function=mine.score", "ppo.steps=5", "judge=none"]
    said = run_in_subprocess(tmp_path, *arguments, "guards=strict", code=3)
    reason = next(line for line in said.splitlines() if line.startswith("rlhf: guard non_finite stopped the run"))
    assert "Traceback" not in said
    (folder,) = (tmp_path / "outputs/rlhf").iterdir()
    assert read_json(folder / "failed.json")["error"] == reason.removeprefix("rlhf: ")
    assert "step-000001.safetensors" in said
    assert StepCheckpoints.reached(folder / "checkpoints") == 1
    assert "continuing from step 1" in (
        milder := run_in_subprocess(tmp_path, *arguments, code=3)
    )  # the same folder: two more steps
    assert "3 steps in a row" in milder
    assert "is the same run" not in milder
    assert StepCheckpoints.reached(folder / "checkpoints") == 3
    said = run_in_subprocess(tmp_path, "-m", *arguments, "name=sweep", "guards=strict", "seed=1", code=1)
    assert "1 failed" in said
    assert read_json(next((tmp_path / "outputs/sweep").glob("*/failed.json")))["error"].startswith("guard non_finite")


def test_the_report_warns_of_what_guards_found(tmp_path: Path) -> None:
    found = {"entropy_rise": {"count": 3, "first_step": 18, "message": "the entropy rose; usual cause: x; try y"}}
    for seed in (1, 2, 3):
        write_run(tmp_path / f"s/run-{seed}", "lora_kl", seed, guards=found if seed > 1 else {})
    said = warnings(load([tmp_path / "s"]))
    assert said == [
        "The guard entropy_rise found something in 2 runs (“variant=lora_kl, seed=2” and “variant=lora_kl, seed=3”), in"
        " the first of them from step 18 on: the entropy rose; usual cause: x; try y."
    ]


def test_a_stopped_run_is_named_with_its_reason_in_the_report(tmp_path: Path) -> None:
    write_run(tmp_path / "s/run-1", "lora_kl", 1)
    (tmp_path / "s/run-2").mkdir()
    (tmp_path / "s/run-2/failed.json").write_text(
        '{"error": "guard spike stopped the run at step 3: x", "traceback": ""}'
    )
    assert "“run-2” failed: guard spike stopped the run at step 3: x" in warnings(load([tmp_path / "s"]))
