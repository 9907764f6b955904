"""Ctrl-C on the command line: once saves and leaves with 75, twice leaves at once with 130."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.command_line import TINY
from tests.helpers.subprocess_runs import last_step


@pytest.mark.long
@pytest.mark.parametrize("times", [1, 2])
def test_the_exit_code_after_ctrl_c(tmp_path: Path, times: int) -> None:
    slow = ["ppo.steps=60", "ppo.rollout_batch_size=64", "ppo.minibatch_size=8", "ppo.epochs=8", "ppo.eval_every=60"]
    command = [sys.executable, "-m", "rlhf", *TINY, *slow, f"output_dir={tmp_path}/outputs"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 200
    while last_step(tmp_path) < 1 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)  # into the middle of the next step
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == {1: 75, 2: 130}[times], said
    assert "Traceback" not in said
    assert "KeyboardInterrupt" not in said
