"""The cores of a container: those of its quota, not those of the machine."""

import os
from pathlib import Path

import pytest

from rlhf.distributed import cores


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine of 64 cores whose cgroup files are in a folder of the test."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    for name in ("SLURM_CPUS_ON_NODE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cores, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "OWN", tmp_path / "own")
    (tmp_path / "own").write_text("0::/pod/container\n")
    (tmp_path / "cgroup" / "pod" / "container").mkdir(parents=True)
    return tmp_path


def test_without_a_quota_it_is_the_machine(machine: Path) -> None:
    (machine / "cgroup" / "pod" / "container" / "cpu.max").write_text("max 100000\n")
    assert cores.available_cores() == 64


@pytest.mark.parametrize("place", ["pod/container", "pod", "."])
def test_the_quota_of_a_container_or_of_what_it_is_in(machine: Path, place: str) -> None:
    (machine / "cgroup" / place / "cpu.max").write_text("350000 100000\n")
    assert cores.available_cores() == 4


def test_the_quota_of_the_first_version(machine: Path) -> None:
    (machine / "own").write_text("4:memory:/pod\n2:cpu,cpuacct:/pod\n")
    (machine / "cgroup" / "cpu" / "pod").mkdir(parents=True)
    (machine / "cgroup" / "cpu" / "pod" / "cpu.cfs_quota_us").write_text("200000\n")
    (machine / "cgroup" / "cpu" / "pod" / "cpu.cfs_period_us").write_text("100000\n")
    assert cores.available_cores() == 2
    (machine / "cgroup" / "cpu" / "pod" / "cpu.cfs_quota_us").write_text("-1\n")
    assert cores.available_cores() == 64


def test_affinity_and_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "12")
    assert cores.available_cores() == 12
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 4, 5}, raising=False)
    assert cores.available_cores() == 3


def test_jobs_and_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cores.threads() == 64
    assert cores.threads(jobs=4, processes=2) == 8
    assert cores.threads(jobs=100) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cores.threads(jobs=4) is None
