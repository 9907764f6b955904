"""`summary.json`: how a run ended, and which machine, code and packages made it."""

import platform
import resource
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rlhf import __version__
from rlhf.distributed import collectives
from rlhf.files import SUMMARY, read_object, write_json
from rlhf.files.checksums import seal
from rlhf.tracking.code import git_commit

PACKAGES = ("torch", "transformers", "peft", "lightning", "datasets", "hydra-core", "bitsandbytes")


def write_summary(
    folder: Path, metrics: Mapping[str, Any], config: Any, started: float, **extra: Any
) -> dict[str, Any]:
    """`summary.json`: written last and at once, so that its presence means the run is complete.

    `started` is of `time.monotonic()`: the clock on the wall may be set back meanwhile.
    """
    summary = {
        "metrics": dict(metrics),
        **extra,
        "wall_seconds": round(time.monotonic() - started, 2),
        "peak_memory_bytes": peak_memory(),
        "threads": torch.get_num_threads(),  # sums over another number of them have other last bits
        "versions": {"rlhf": __version__, "python": platform.python_version(), **_versions()},
        "git_commit": git_commit(),
        "config": config,
    }
    if collectives.size() > 1:
        summary["processes"] = collectives.size()
    collectives.on_rank_zero(lambda: seal(folder))
    collectives.on_rank_zero(lambda: write_json(folder / SUMMARY, summary))
    return summary


def read_summary(folder: Path) -> dict[str, Any] | None:
    """A run's summary, or None while it is not complete.

    Raises:
        DamagedError: it is no summary.
    """
    path = folder / SUMMARY
    return read_object(path, metrics=dict) if path.exists() else None


def run_id(summary: Mapping[str, Any]) -> str:
    """What a finished run is called where names must be unique, as in W&B."""
    return f"{summary['stage']}-{summary['identity']}"


def peak_memory() -> int:
    """Peak memory of this process in bytes: the GPU's allocations where there is one, else the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found
