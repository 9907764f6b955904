"""The benchmark scripts run at toy size and print their tables (peer.py needs an installed package).

`gpu_runner.py`, which divides the time of a machine that is lent for minutes, keeps to its budget and loses nothing.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rlhf import root

SCRIPTS = {
    "decode.py": ["--toy"],
    "scale.py": ["--toy"],
    "passes.py": ["--toy"],
    "gpu.py": ["--toy"],
}
COLUMNS = {
    "decode.py": "native is faster by",
    "scale.py": "peak of a step (MiB)",
    "passes.py": "read states only is faster by",
    "gpu.py": "predicted (GiB)",
}


@pytest.mark.long
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_toy_size_runs_to_its_end(script: str, tmp_path: Path) -> None:
    results = ["--results", str(tmp_path / "gpu.jsonl")] if script == "gpu.py" else []
    command = [sys.executable, str(benchmarks() / script), *SCRIPTS[script], *results]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root())
    assert done.returncode == 0, done.stderr[-2000:]
    assert COLUMNS[script] in done.stdout
    if results:
        lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines() if line]
        assert {line["part"] for line in lines if line["kind"] == "end"} >= {
            "smoke",
            "probe",
            "smollm2",
            "neox_20b_nf4",
        }
        assert not [line for line in lines if line["kind"] == "cut off" or line.get("ok") is False]
        assert {line["warm_up"] for line in lines if line["kind"] == "step"} == {True, False}


def benchmarks() -> Path:
    if not (root() / "benchmarks").is_dir():
        pytest.skip("not a checkout")
    return root() / "benchmarks"


def test_stages_sample_at_a_temperature_of_1_as_trl_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The length of answers, and with it every time, depends on it; the default data chooses another one."""
    monkeypatch.syspath_prepend(str(benchmarks()))
    import stage

    assert stage.composed(stage.FIXED)[1].generation.temperature == 1


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(benchmarks()))
    import gpu_runner

    return gpu_runner


def run(
    runner: ModuleType, file: Path, items: Mapping[str, Any], seconds: float = 60, **part: float
) -> list[dict[str, Any]]:
    """Run a part as `gpu.py` does; the lines of the results file."""
    bench = runner.Bench(file, "cpu", True, time.monotonic() + seconds)
    runner.run_parts([("part", runner.Part(items, **{"needs": 0, "limit": 60, **part}))], bench, "fork")
    return runner.read(file)


def quick(bench: Any) -> dict[str, int]:
    return {"process": os.getpid()}


def endless(bench: Any) -> None:
    bench.say("step", number=1)
    time.sleep(600)


def raising(bench: Any) -> None:
    raise RuntimeError("an illegal memory access")


def dying(bench: Any) -> None:
    os.kill(os.getpid(), 9)


def ended(lines: list[dict[str, Any]]) -> dict[str, bool]:
    return {line["item"]: line["ok"] for line in lines if line["kind"] == "end"}


def test_a_part_that_overruns_is_cut_off_and_leaves_its_steps(runner: ModuleType, tmp_path: Path) -> None:
    started = time.monotonic()
    lines = run(runner, tmp_path / "x", {"quick": quick, "endless": endless, "late": quick}, limit=1)
    assert time.monotonic() - started < 10
    assert [line["kind"] for line in lines] == ["end", "step", "cut off"]
    assert lines[-1]["items"] == ["endless", "late"]


def test_a_failing_item_ends_its_process_and_the_others_run_in_a_new_one(runner: ModuleType, tmp_path: Path) -> None:
    items = {"before": quick, "raising": raising, "between": quick, "dying": dying, "after": quick}
    lines = run(runner, tmp_path / "x", items)
    assert ended(lines) == {"before": True, "raising": False, "between": True, "dying": False, "after": True}
    assert len({line["process"] for line in lines if "process" in line}) == 3
    assert "illegal memory access" in next(line["error"] for line in lines if line["item"] == "raising")


def test_a_second_run_does_what_is_missing(runner: ModuleType, tmp_path: Path) -> None:
    run(runner, tmp_path / "x", {"quick": quick, "endless": endless}, limit=1)
    with (tmp_path / "x").open("a") as file:
        file.write('{"part": "part", "item": "endl')  # what a process that is killed may leave
    lines = run(runner, tmp_path / "x", {"quick": quick, "endless": quick})
    assert [line["item"] for line in lines if line["kind"] == "end"] == ["quick", "endless"]


def test_a_part_is_not_begun_without_the_time_it_needs(runner: ModuleType, tmp_path: Path) -> None:
    lines = run(runner, tmp_path / "x", {"quick": quick}, seconds=5, needs=10)
    assert [line["kind"] for line in lines] == ["skipped"]
