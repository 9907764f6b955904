"""Every stage on a simulated GPU: no operator gets tensors of two devices, and the host rarely waits for the device."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

STEP_SYNCS = 45  # of a whole PPO step with one optimiser step, at most: 39 were counted, 23 of them by masked means


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Host syncs, from a process of its own: the simulation changes PyTorch for good."""
    command = [sys.executable, "-m", "tests.helpers.simulated_steps", str(tmp_path_factory.mktemp("simulated"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr[-3000:]  # a mix of devices is named there
    return json.loads(done.stdout.splitlines()[-1])


def test_the_simulation_refuses_mixes_and_counts_syncs(counts: dict[str, Any]) -> None:
    assert "tensors on cuda:0 and on the host" in counts["check"]["mixed"]
    assert (counts["check"]["looks"], counts["check"]["none"]) == (1, 0)


def test_decoding_waits_for_no_token(counts: dict[str, Any]) -> None:
    """Not even to look for finished rows: the host learns their number a look late."""
    assert counts["32 tokens"] == counts["16 tokens"]


def test_no_microbatch_waits(counts: dict[str, Any]) -> None:
    """Its forward passes and its loss, that is: backward passes are not simulated."""
    few, many = counts["few"], counts["many"]
    assert many["microbatches"] > few["microbatches"] + 2
    assert many["syncs"] == few["syncs"] == 0, many["places"]
    assert many["step"] == few["step"] <= STEP_SYNCS, many["places"]


@pytest.mark.parametrize("stage", ["evaluation", "sft", "reward"])
def test_the_other_stages_run_without_a_mix(counts: dict[str, Any], stage: str) -> None:
    assert 0 < counts[stage] < 200
