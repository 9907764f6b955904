"""`summary.json`: the results of a complete run, its configuration, and the code and packages that made it."""

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
from rlhf.tracking import sessions
from rlhf.tracking.code import git_commit

PACKAGES = ("torch", "transformers", "tokenizers", "peft", "lightning", "datasets", "numpy", "hydra-core",
            "bitsandbytes", "vllm")  # fmt: skip


def write_summary(
    folder: Path, metrics: Mapping[str, Any], config: Any, started: float, **extra: Any
) -> dict[str, Any]:
    """Write a run's `summary.json` and return its content.

    It is written last and atomically, so that its presence means that the run is complete. Rank zero writes it, after
    the checksums of the run's models.

    Args:
        folder: the run.
        metrics: the final metrics.
        config: the resolved configuration.
        started: when the run started, by `time.monotonic()`, as the system's clock may be set back during the run.
        extra: further entries, such as `stage` and `identity`.
    """
    summary = {
        "metrics": dict(metrics),
        **extra,
        **sessions.told(folder, time.monotonic() - started, peak_memory()),
        **environment(),
        "config": config,
    }
    collectives.on_rank_zero(lambda: seal(folder))
    collectives.on_rank_zero(lambda: write_json(folder / SUMMARY, summary))
    return summary


def read_summary(folder: Path) -> dict[str, Any] | None:
    """A run's summary, or None if the run is not complete. `rlhf.tracking.reading.try_summary` does not raise.

    Raises:
        DamagedError: the file is not a JSON object with `metrics`.
    """
    path = folder / SUMMARY
    return read_object(path, metrics=dict) if path.exists() else None


def run_id(summary: Mapping[str, Any]) -> str:
    """A unique name of a finished run, which is its id in W&B: its stage and identity."""
    return f"{summary['stage']}-{summary['identity']}"


def environment() -> dict[str, Any]:
    """What this process computes with (`rlhf.tracking.sessions.ENVIRONMENT`); call it once the models are in place."""
    gpu = _uses_gpu()
    return {
        "device": "cuda" if gpu else "cpu",
        "processor": torch.cuda.get_device_name() if gpu else _processor(),
        "threads": torch.get_num_threads(),  # the last bits of sums depend on their number
        "processes": collectives.size(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),  # on a GPU they vary without it
        "versions": {"rlhf": __version__, "python": platform.python_version(), **_versions()},
        "git_commit": git_commit(),
    }


def peak_memory() -> int:
    """Peak memory of this process in bytes: allocations on the GPU if it uses one, else the resident set size."""
    if _uses_gpu():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def _uses_gpu() -> bool:
    """Whether this process has put anything on a GPU; with `trainer=cpu` it leaves one that is there alone."""
    return torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The name of the CPU, and the instructions for which torch chooses its kernels."""
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _versions() -> dict[str, str]:
    """Package → installed version, or "absent"."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found
