"""Host memory: what one step frees is kept for the next."""

import ctypes
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names of glibc's mallopt
KEPT_BYTES = 2**31 - 1  # the largest value that mallopt takes
MAPPED_BYTES = 2**27  # whole weight matrices of large models go back to the system


def keep_freed_memory() -> None:
    """Make glibc keep the memory of freed tensors instead of returning it to the system.

    Otherwise every tensor of a megabyte or more is mapped anew, and the system provides its pages one page fault at a
    time, which takes a tenth to a fifth of a step on a CPU. With another C library this does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(TRIM_THRESHOLD, KEPT_BYTES)
        libc.mallopt(MMAP_THRESHOLD, MAPPED_BYTES)
