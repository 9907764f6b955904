"""The number of threads of a run, and its duration when the system clock is changed."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf.cli import _share_cores
from rlhf.sweep.states import _run_seconds_left
from rlhf.tracking.summary import write_summary


@pytest.mark.parametrize(
    ("said", "now", "jobs", "processes", "expected"),
    [
        ("1", 1, 1, 1, 1),  # a job of a sweep gets the bits of the single run
        ("3", 3, 4, 1, 3),
        (None, 6, 1, 1, 6),  # alone on the machine: as many threads as torch chooses for the single run
        (None, 6, 4, 1, 2),
        (None, 1, 2, 1, 1),
        ("4", 4, 2, 4, 1),  # joblib sets the variable for a job, not for the processes that a job starts
        ("1", 1, 1, 2, 1),
    ],
)
def test_the_variable_decides_over_threads_and_jobs_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, said: str | None, now: int, jobs: int, processes: int, expected: int
) -> None:
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if said:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    monkeypatch.setattr("rlhf.distributed.cores.available_cores", lambda: 8)
    torch.set_num_threads(now)
    try:
        _share_cores(jobs, processes)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(1)


def test_a_summary_says_threads_and_a_clock_set_back_makes_no_time_negative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = time.monotonic()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    summary = write_summary(tmp_path, {}, {}, started - 2, stage="sft")
    assert 2 <= summary["wall_seconds"] < 10
    assert summary["threads"] == 1


def test_remaining_time_is_never_negative(tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text("ppo: {steps: 10}")
    lines = [{"step": i, "time": t, "ppo/reward": 0.0} for i, t in ((1, 50.0), (2, 60.0), (3, 0.0), (4, 10.0))]
    assert _run_seconds_left(tmp_path, lines) == 60.0
    assert _run_seconds_left(tmp_path, lines[1:3]) is None


def test_a_sweeps_run_says_the_threads_that_the_single_run_has(command: Callable, tmp_path: Path) -> None:
    job = ["debug=quick", "stage=sft", "logger=csv", "sft.max_steps=1"]
    for name, options in (("one", []), ("many", ["-m"])):
        code, _, error = command(*options, *job, f"output_dir={tmp_path / name}")
        assert code == 0, error
    told = {json.loads(path.read_text())["threads"] for path in tmp_path.rglob("summary.json")}
    assert told == {1}
