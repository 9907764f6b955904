"""What has computed a run: noted for each session, said when it changes, and found again in summary and report."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.files import ANSWERS, METRICS, SESSIONS, SUMMARY, read_json, write_json, write_lines
from rlhf.tracking import sessions
from rlhf.tracking.summary import environment
from tests.helpers import killed_runs
from tests.helpers.command_line import TINY

HERE = {"device": "cpu", "processor": "A", "threads": 1, "deterministic": False, "versions": {"torch": "2.13"},
        "git_commit": "one"}  # fmt: skip


def steps(folder: Path) -> list[int]:
    return [entry["from_step"] for entry in read_json(folder / SESSIONS)["sessions"]]


def test_only_a_session_that_computes_with_something_else_is_noted_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sessions.begin(tmp_path, 0, HERE)
    sessions.begin(tmp_path, 4, HERE)
    assert steps(tmp_path) == [0]
    assert not caplog.messages
    sessions.begin(tmp_path, 6, {**HERE, "threads": 2, "versions": {"torch": "2.14", "vllm": "1"}})
    assert steps(tmp_path) == [0, 6]
    (said,) = caplog.messages
    assert said.startswith("from step 6 on")
    assert said.endswith("threads=2 instead of 1, torch=2.14 instead of 2.13")


def test_what_is_trained_again_does_not_count(tmp_path: Path) -> None:
    """After a damaged checkpoint the one before it is continued; without any, all begins anew."""
    for step, commit in ((0, "one"), (4, "two"), (8, "three")):
        sessions.begin(tmp_path, step, {**HERE, "git_commit": commit})
    sessions.begin(tmp_path, 6, {**HERE, "git_commit": "two"})
    assert steps(tmp_path) == [0, 4]
    sessions.begin(tmp_path, 0, {**HERE, "git_commit": "two"})
    assert steps(tmp_path) == [0]


def test_a_run_that_an_earlier_version_began_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sessions.begin(tmp_path, 4, HERE)
    assert steps(tmp_path) == [0, 4]
    assert "of which nothing was noted" in caplog.text


def test_answers_that_a_policy_learns_from_count_before_its_first_step(tmp_path: Path) -> None:
    """They are sampled by one process; another one finds them, and trains from the first step on."""
    sessions.begin(tmp_path, 0, HERE)
    (tmp_path / ANSWERS).mkdir()
    sessions.begin(tmp_path, 0, {**HERE, "threads": 2})
    assert [entry["threads"] for entry in read_json(tmp_path / SESSIONS)["sessions"]] == [1, 2]


def test_an_evaluation_notes_what_has_measured_its_steps(tmp_path: Path) -> None:
    """In any order; one that measured nothing does not count; that of an earlier version has left a summary."""
    sessions.begin_measuring(tmp_path, 3, {**HERE, "threads": 3})
    sessions.begin_measuring(tmp_path, 3, HERE)
    write_lines(tmp_path / METRICS, [{"step": 3, "time/evaluate": 1.0}])
    sessions.begin_measuring(tmp_path, 0, {**HERE, "threads": 2})
    told = sessions.told(tmp_path, 1.0, 1)
    assert [entry["threads"] for entry in sessions.environments(told)] == [1, 2]
    (tmp_path / SESSIONS).unlink()
    write_json(tmp_path / SUMMARY, {"metrics": {}, **HERE})
    sessions.begin_measuring(tmp_path, 0, {**HERE, "threads": 2})
    assert [entry["threads"] for entry in read_json(tmp_path / SESSIONS)["sessions"]] == [1, 2]


def test_an_evaluation_that_takes_over_what_the_training_measured_notes_its_environment_and_not_its_time(
    tmp_path: Path,
) -> None:
    run, evaluation = tmp_path / "run", tmp_path / "evaluation"
    for folder in (run, evaluation):
        folder.mkdir()
        write_lines(folder / METRICS, [{"step": 3, "time/evaluate": 1.0}])
    sessions.begin(run, 0, HERE)
    sessions.extend(run, 100.0, 100)
    sessions.copy(run, evaluation)
    sessions.begin_measuring(evaluation, 0, {**HERE, "threads": 2})
    told = sessions.told(evaluation, 1.0, 1)
    assert [entry["threads"] for entry in told["sessions"]] == [1, 2]
    assert (told["wall_seconds"], told["peak_memory_bytes"]) == (1.0, 1)


def test_threads_count_only_where_they_compute() -> None:
    gpu = {**HERE, "device": "cuda"}
    assert not sessions.differences(gpu, {**gpu, "threads": 2})
    assert sessions.differences(HERE, {**HERE, "threads": 2})


def test_time_and_memory_are_those_of_all_sessions(tmp_path: Path) -> None:
    """A killed session counts up to its last checkpoint, however often it is continued there."""
    assert sessions.told(tmp_path, 3.0, 5) == {"wall_seconds": 3.0, "peak_memory_bytes": 5}
    sessions.begin(tmp_path, 0, HERE)
    sessions.extend(tmp_path, 10.0, 7)
    sessions.extend(tmp_path, 20.0, 9)
    for _ in range(3):
        sessions.begin(tmp_path, 4, HERE)
    sessions.extend(tmp_path, 5.0, 8)
    assert sessions.told(tmp_path, 6.0, 8) == {"wall_seconds": 26.0, "peak_memory_bytes": 9}
    assert sessions.told(tmp_path, 0.5, 1)["wall_seconds"] == 25.0  # it only wrote the summary


def test_this_process_knows_what_it_computes_with() -> None:
    found = environment()
    assert tuple(found) == sessions.ENVIRONMENT
    assert sessions.facts(found)["torch"]
    assert found["processor"].strip(" ,")


@pytest.mark.slow
def test_a_run_that_is_continued_with_other_threads_says_so(tmp_path: Path) -> None:
    command = ["-m", *TINY, "stage=sft", f"output_dir={tmp_path}/outputs"]
    process = killed_runs.start(tmp_path, command, "rlhf.stages.base:Stage.accumulate", 4, 0, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    environ = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-m", "rlhf", *command], env=environ, cwd=tmp_path, text=True, check=True,
                          capture_output=True)  # fmt: skip
    assert "threads=2 instead of 1" in done.stdout + done.stderr
    (summary,) = tmp_path.glob("outputs/cache/sft-*/summary.json")
    made: dict[str, Any] = json.loads(summary.read_text())
    assert [(entry["from_step"], entry["threads"]) for entry in made["sessions"]] == [(0, 1), (2, 2)]
    assert made["threads"] == 2
    noted = read_json(summary.parent / SESSIONS)
    assert 0 < noted["before"] < noted["seconds"] < made["wall_seconds"]
