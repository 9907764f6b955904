"""File locks: the system's, which it releases when their holder dies, or else lock files with a heartbeat."""

import errno
import logging
import os
import re
import socket
import time
from contextlib import suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, LeaseCompromise, SoftFileLease, Timeout

log = logging.getLogger(__name__)
WAIT_MESSAGE_SECONDS = 30.0
LEASE_SECONDS = 300.0  # a lock file that is not touched for so long is taken over; its holder does so every 20 seconds
HEARTBEAT_SECONDS = 20.0
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # of some network and user-space file systems


def acquire(path: Path, reason: str) -> BaseFileLock:
    """Hold the lock `path`; while another process holds it, wait and say so, and who it is.

    Where the file system has no locks, a file beside it is the lock. It is touched regularly, so that one whose holder
    died is taken over: at once on the same host, after `LEASE_SECONDS` on another.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock: BaseFileLock = _wait_for(FileLock(path, fallback_to_soft=False), path, reason)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.info("%s: this file system has no locks (%s); a lock file is used", path.parent, os.strerror(error.errno))
        return _wait_for(_lease(path.with_name(f"{path.name}.held")), path, reason)
    with suppress(OSError):  # whom those who wait will name
        path.write_text(f"pid={os.getpid()}\nhost={socket.gethostname()}\n", encoding="utf-8")
    return lock


def _lease(path: Path) -> SoftFileLease:
    return SoftFileLease(path, lease_duration=LEASE_SECONDS, heartbeat_interval=HEARTBEAT_SECONDS, on_compromise=_leave)


def _leave(lost: LeaseCompromise) -> None:
    """We were silent for too long, suspended perhaps, and another process has taken over: two must not write.

    To leave at once is what a kill would do, after which the other continues exactly.
    """
    log.critical("%s was lost (%s): another process may have taken over, so this one ends", lost.lock_file, lost.reason)
    os._exit(1)


def _wait_for(lock: BaseFileLock, path: Path, reason: str) -> BaseFileLock:
    started, timeout = time.monotonic(), 0.0
    while True:
        try:
            lock.acquire(timeout=timeout)
            return lock
        except Timeout:
            holder = _holder(Path(lock.lock_file))
            log.info("waiting (%.0f s so far): %s%s", time.monotonic() - started, reason, holder)
            timeout = WAIT_MESSAGE_SECONDS


def _holder(path: Path) -> str:
    """Who holds a lock, as its file says, in the words of filelock's lock files."""
    try:
        told = re.search(r"^pid=(\d+)\nhost=(\S+)$", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    except OSError:
        return ""
    return f" (process {told[1]} on {told[2]})" if told else ""
