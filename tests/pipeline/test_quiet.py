"""Not one line of other libraries' on the terminal: in a run, in one that goes on, in its report and in a chat."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.command_line import TINY
from tests.helpers.subprocess_runs import run_tiny, stop_after_a_step

NOISE = ("Warning", "warn(", "bitsandbytes", "unreliable", "deprecated", "Traceback", "LOAD REPORT")


def entry(module: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Call `main` of a command's module."""
    code = f"import sys; from {module} import main; sys.argv = [{', '.join(map(repr, ('command', *words)))}]; main()"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, input="Hello\n", capture_output=True, text=True, check=False
    )


def check_quiet(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    assert not [line for line in done.stdout.splitlines() if any(word in line for word in NOISE)]


@pytest.mark.slow
def test_the_first_command_on_a_machine_does_not_say_that_fonts_are_listed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlhf", *TINY, "dry_run=true"]
    env = {**os.environ, "MPLCONFIGDIR": str(tmp_path / "matplotlib")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    check_quiet(done)
    assert list(tmp_path.glob("matplotlib/fontlist*.json"))
    assert "fontManager" not in done.stdout


@pytest.mark.long
def test_commands_say_nothing_of_what_other_libraries_say(tmp_path: Path) -> None:
    # 1. a run that is stopped and goes on
    options = ["ppo.steps=5", "ppo.checkpoint_every=1"]
    assert stop_after_a_step(tmp_path, to_child=False, options=options) == 75
    check_quiet(run_tiny(tmp_path, *options))
    # 2. what is made of it
    (folder,) = {path.parent for path in tmp_path.glob("outputs/rlhf/*/summary.json")}
    check_quiet(entry("rlhf.report.cli", tmp_path, str(folder)))
    check_quiet(entry("rlhf.finished.chat.cli", tmp_path, str(folder)))
    # 3. a sweep
    axis = ["output_dir=outputs", "name=sweep", "replicate=1,2"]
    sweep = [sys.executable, "-m", "rlhf", "-m", *TINY, *axis]
    check_quiet(subprocess.run(sweep, cwd=tmp_path, capture_output=True, text=True, check=False))
