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
    for i in range(100):
        tensors = [torch.ones(2**20 + 2**16 * ((i + j) % 5)) for j in range(16)]
        del tensors[::2], tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
faults(); before = faults(); print(faults() - before)
"""


def faults(line: str) -> int:
    done = subprocess.run([sys.executable, "-c", CODE.format(line)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again() -> None:
    assert 10 * faults("keep_freed_memory()") < faults("")
