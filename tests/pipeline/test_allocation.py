"""The allocator reuses freed memory instead of asking the system again."""

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, torch
from rlhf.pipeline.allocation import keep_freed_memory
{}
def faults():
    for _ in range(20):
        torch.ones(10 * 2**20)  # larger than what glibc ever keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
faults(); before = faults(); print(faults() - before)
"""


def faults(line: str) -> int:
    done = subprocess.run([sys.executable, "-c", CODE.format(line)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again() -> None:
    assert 2 * faults("keep_freed_memory()") < faults("")
