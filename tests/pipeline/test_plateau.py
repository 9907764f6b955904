"""Evaluations at chosen steps, and the end of a run whose evaluations no longer improve."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rlhf.data.records import Prompt
from rlhf.files import read_json
from rlhf.pipeline.checkpoints import Best, StepCheckpoints
from rlhf.pipeline.measuring import last_step
from rlhf.pipeline.plateau import Plateau
from rlhf.pipeline.train_policy import train_policy
from rlhf.stages.ppo import PPO
from rlhf.tracking.metrics_file import read_metrics
from tests.helpers.command_line import TINY
from tests.helpers.composed_config import composed_plan
from tests.helpers.ppo_stages import PROMPTS, make_ppo, ppo_settings
from tests.helpers.training import copy_weights, quiet_trainer


@pytest.mark.parametrize(
    ("values", "mode", "min_gain", "step"),
    [
        ((0.2, 0.3, 0.4, 0.5), "max", 0.0, None),
        ((0.2, 0.3, 0.3, 0.3), "max", 0.0, 30),  # the second evaluation without a gain
        ((0.2, 0.3, 0.1, 0.31, 0.2, 0.1), "max", 0.0, 50),  # a gain starts the count again
        ((0.5, 0.3, 0.4), "max", 0.0, 20),  # step 0 counts: worse than the SFT model
        ((0.2, 0.21, 0.22, 0.23), "max", 0.02, 20),  # gains that are too small
        ((0.2, 0.21, 0.24, 0.25, 0.27), "max", 0.02, None),
        ((3.0, 2.0, 1.0, 1.5, 1.0), "min", 0.0, 40),
        ((0.2, None, math.nan), "max", 0.0, 20),
    ],
)
def test_a_plateau_is_two_evaluations_without_a_gain(
    tmp_path: Path, values: tuple, mode: str, min_gain: float, step: int | None
) -> None:
    rows = [{"step": 10 * i, "time/evaluate": 1.0, "eval/win_rate": value} for i, value in enumerate(values)]
    lines = [json.dumps({k: v for k, v in row.items() if v is not None}) for row in rows]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    plateau = Plateau(Best(tmp_path, "eval/win_rate", mode), 2, min_gain)
    assert plateau.step() == step
    assert (plateau.describe() is None) == (step is None)


# win rates at the steps that `eval_every=[2, 3, 5, 6, 8]` names
VERDICTS = {0: 0.2, 2: 0.5, 3: 0.4, 5: 0.45, 6: 0.9, 8: 0.9}


class PowerCutError(Exception):
    pass


def run(
    folders: SimpleNamespace, folder: Path, seen: dict[int, dict[str, Tensor]], fail_at: tuple[int, str] = (0, "")
) -> PPO:
    """Call `train_policy` on `folder`; the policy at each evaluation is put into `seen`."""
    options = {"steps": 8, "eval_every": [2, 3, 5, 6, 8], "patience": 2, "checkpoint_every": 4, "epochs": 1,
               "rollout_batch_size": 6}  # fmt: skip
    stage = make_ppo(ppo_settings(**options), folders, folder / "samples.jsonl")

    def judge(prompts: Any, responses: Any) -> tuple[dict, list[dict]]:
        if fail_at == (stage.ppo_step, "evaluation"):
            raise PowerCutError
        seen[stage.ppo_step] = copy_weights(stage.roles)
        return {"eval/win_rate": VERDICTS[stage.ppo_step]}, [{"win": 0.5} for _ in responses]

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        if fail_at == (stage.ppo_step + 1, "step") and len(prompts) == 6:  # an evaluation has 4
            raise PowerCutError
        return [float(len(response)) for response in responses]

    stage.evaluator, stage.scorer.function = judge, score  # type: ignore[attr-defined]
    folder.mkdir(exist_ok=True)
    evaluation: DataLoader = DataLoader([Prompt(p, "w5") for p in PROMPTS[:4]], batch_size=4, collate_fn=list)  # type: ignore[arg-type]
    train_policy(quiet_trainer, stage, PROMPTS, evaluation, folder, "auto", Best(folder, "eval/win_rate", "max"))
    return stage


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_metrics(folder) if "time/evaluate" in line]


def test_a_run_ends_at_the_plateau_however_often_it_was_interrupted(folders: SimpleNamespace, tmp_path: Path) -> None:
    straight: dict[int, dict[str, Tensor]] = {}
    stage = run(folders, tmp_path / "straight", straight)
    assert steps(tmp_path / "straight") == [0, 2, 3, 5]  # 3 and 5 are below 2: step 6 would have been better
    assert stage.ppo_step == 5
    assert StepCheckpoints.reached(tmp_path / "straight" / "checkpoints") == 5

    broken: dict[int, dict[str, Tensor]] = {}
    for moment in ((2, "evaluation"), (3, "step"), (5, "step"), (5, "evaluation")):
        with pytest.raises(PowerCutError):
            run(folders, tmp_path / "broken", broken, moment)
    for _ in range(2):  # finished, and called again: nothing is trained or measured any more
        resumed = run(folders, tmp_path / "broken", broken, (6, "step"))
        assert steps(tmp_path / "broken") == [0, 2, 3, 5]
        assert resumed.ppo_step == 5
        for name, weight in copy_weights(resumed.roles).items():
            assert torch.equal(weight, straight[5][name]), name
    rates = [[line["eval/win_rate"] for line in read_metrics(tmp_path / name) if "time/evaluate" in line]
             for name in ("straight", "broken")]  # fmt: skip
    assert rates[0] == rates[1]


def test_with_a_plateau_the_evaluation_decides_what_is_trained(tmp_path: Path) -> None:
    for patience, same in (("null", True), ("2", False)):
        identities = {
            composed_plan(tmp_path, f"ppo.patience={patience}", f"evaluation.prompts={prompts}").identity
            for prompts in (10, 20)
        }
        assert (len(identities) == 1) == same


def test_the_last_policy_of_a_run_is_that_of_the_plateau() -> None:
    summary: dict[str, Any] = {"config": {"ppo": {"steps": 9}}}
    assert last_step(summary) == last_step({**summary, "plateau": None}) == 9
    assert last_step({**summary, "plateau": {"step": 5, "reason": ""}}) == 5


def test_the_summary_says_where_and_why_a_run_ended(command: Callable) -> None:
    ends = ["ppo.steps=6", "ppo.eval_every=[1,3,6]", "ppo.patience=1", "ppo.keep_best=eval/reward", "ppo.min_gain=1000"]
    code, out, err = command(*TINY, *ends)
    assert code == 0, err
    folder = next(path.parent for path in Path("outputs/rlhf").glob("*/summary.json"))
    summary = read_json(folder / "summary.json")
    assert summary["plateau"] == {"step": 1, "reason": "eval/reward has not improved for 1 evaluation"}
    assert steps(folder) == [0, 1]
    assert "ended at step 1 of 6" in " ".join(out.split())
