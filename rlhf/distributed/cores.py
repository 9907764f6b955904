"""How many cores this process may use. torch counts those of the machine, of which a container often has a few."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def available_cores() -> int:
    """The cores that scheduler, affinity and the quota of the cgroup leave to this process; 1 at least."""
    granted = [os.cpu_count() or 1, *_quotas()]
    if hasattr(os, "sched_getaffinity"):  # Linux
        granted.append(len(os.sched_getaffinity(0)))
    if "SLURM_CPUS_ON_NODE" in os.environ:
        granted.append(int(os.environ["SLURM_CPUS_ON_NODE"]))
    return max(1, min(granted))


def threads(jobs: int = 1, processes: int = 1) -> int | None:
    """Threads for each process of each of `jobs` runs at once; None if OMP_NUM_THREADS says how many."""
    if "OMP_NUM_THREADS" in os.environ and processes == 1:  # joblib sets it to a worker's share
        return None
    return max(1, available_cores() // (jobs * processes))


def _quotas() -> Iterator[int]:
    """Cores by the quota of every cgroup that this process is in, rounded up (version 2 and 1)."""
    try:
        lines = OWN.read_text(encoding="utf-8").splitlines()
    except OSError:  # another system than Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = CGROUPS / ("cpu" if controllers else "")
        for place in (top / path.lstrip("/"), *(top / path.lstrip("/")).parents):
            if place == CGROUPS.parent:
                break
            yield from _quota_of(place)


def _quota_of(place: Path) -> Iterator[int]:
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((place / name).read_text(encoding="utf-8") for name in names).split()
            if quota != "max" and int(quota) > 0:
                yield math.ceil(int(quota) / int(period))
        except (OSError, ValueError):
            continue
