"""The `rlhf` command in separate processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.command_line import TINY

QUICK = ["debug=quick", "logger=csv", "model.config.num_hidden_layers=1", "model.config.hidden_size=32", "data=farm"]


def run_in_subprocess(folder: Path, *arguments: str, code: int = 0) -> str:
    """Run the command in a separate process in `folder`; return its output. Asserts the exit code `code`."""
    flags = [argument for argument in arguments if argument.startswith("-")]  # argparse wants flags first
    overrides = [f"output_dir={folder}/outputs", *(argument for argument in arguments if argument not in flags)]
    done = subprocess.run(
        [sys.executable, "-m", "rlhf", *flags, *overrides],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_tiny(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command with the overrides `TINY` in a separate process; the exit code is not checked."""
    command = [sys.executable, "-m", "rlhf", *TINY, f"output_dir={folder}/outputs", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)


def cached_weights(folder: Path, stage: str) -> dict[str, Tensor]:
    """The weights of the cached model of a stage (`sft` or `reward`)."""
    path = next(folder.glob(f"outputs/cache/{stage}-*/model/*.safetensors"))
    return load_file(path)


def stop_after_a_step(folder: Path, to_child: bool, options: Sequence[str]) -> int:
    """Start a run, send SIGTERM to the launcher or its second process after the next step; return the exit code."""
    command = [sys.executable, "-m", "rlhf", *TINY, f"output_dir={folder}/outputs", *options]
    before = last_step(folder)
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while last_step(folder) <= before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]) if to_child else process.pid, signal.SIGTERM)
    return process.wait(timeout=120)


def last_step(folder: Path) -> int:
    """The last step in the metrics of the run in a folder, or 0."""
    lines = [line for path in folder.glob("outputs/rlhf/*/metrics.jsonl") for line in path.read_text().splitlines()]
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)
