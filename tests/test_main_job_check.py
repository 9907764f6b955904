"""CI's check of the main job: a healthy run passes, and a sick one fails by the numbers that show it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf import root

# Measured: the default of replicate 1, in which PPO exploits its reward model, and the same pipeline with
# data=farm_groups, reward=grouped, kl.coef=0.1 and generation.temperature=0.5
BEFORE = {"eval/win_rate": 0.195, "eval/gold_utility": 1.29, "eval/response_tokens": 14.65, "eval/true_kl": 0.0}
SICK = {"eval/win_rate": 0.17, "eval/gold_utility": 0.64, "eval/response_tokens": 31.7, "eval/true_kl": 0.086}
HEALTHY = {"eval/win_rate": 0.375, "eval/gold_utility": 1.76, "eval/response_tokens": 27.8, "eval/true_kl": 0.085}


def write(folder: Path, after: Any) -> Path:
    folder.mkdir()
    if after is not None:
        (folder / "summary.json").write_text(json.dumps({"sft_metrics": BEFORE, "metrics": after}))
    return folder


def check(*folders: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, root() / ".ci" / "check_main_job.py", *folders], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout


def test_a_healthy_run_passes(tmp_path: Path) -> None:
    assert check(write(tmp_path / "run", HEALTHY))[0] == 0


@pytest.mark.parametrize(
    ("after", "failing"),
    [
        (SICK, ["win rate at least 10 points above SFT (-2.5)", "gold utility above SFT (1.29 → 0.64)"]),
        (HEALTHY | {"eval/win_rate": 0.29}, ["win rate at least 10 points above SFT (+9.5)"]),
        (HEALTHY | {"eval/gold_utility": 1.2}, ["gold utility above SFT (1.29 → 1.20)"]),
        (HEALTHY | {"eval/response_tokens": 14.0}, ["longer responses"]),
        (HEALTHY | {"eval/true_kl": 0.0}, ["true KL above zero, and zero before"]),
        (None, ["it ended"]),
    ],
)
def test_a_sick_run_fails(tmp_path: Path, after: Any, failing: list[str]) -> None:
    code, said = check(write(tmp_path / "run", after))
    assert code == 1
    assert [line.removeprefix("FAILED: ") for line in said.splitlines() if line.startswith("FAILED")] == failing


def test_one_sick_pipeline_among_healthy_ones_fails(tmp_path: Path) -> None:
    folders = [write(tmp_path / f"replicate-{number}", HEALTHY) for number in (1, 2)]
    folders.append(write(tmp_path / "report", None))  # the sweep's report, not a run
    assert check(*folders)[0] == 0
    code, said = check(*folders, write(tmp_path / "replicate-3", SICK))
    assert code == 1
    assert "FAILED: gold utility above SFT (1.29 → 0.64) in replicate-3" in said
    assert check()[0] == 1
