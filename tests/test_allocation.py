"""Memory that is used again and again comes from the system once."""

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, torch
from rlhf.allocation import keep_freed_memory
{}
def faults():
    for _ in range(100):
        tensors = [torch.ones(2**20) for _ in range(8)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
faults(); before = faults(); print(faults() - before)
"""


def faults(line: str) -> int:
    done = subprocess.run([sys.executable, "-c", CODE.format(line)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again() -> None:
    assert faults("keep_freed_memory()") < 10_000 < faults("")  # of 100 times 8 tensors of 1,024 pages
