"""File locks: those of the system, which it releases when the holder dies, or else lock files with a heartbeat."""

import errno
import fcntl
import logging
import os
import re
import socket
import time
from contextlib import suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, LeaseCompromise, SoftFileLease, Timeout

log = logging.getLogger(__name__)
WAIT_MESSAGE_SECONDS = 30.0  # between messages that the lock is still held by another process
LEASE_SECONDS = 300.0  # a lock file that was not touched for so long is taken over
HEARTBEAT_SECONDS = 20.0  # how often the holder touches its lock file
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # from network and user-space file systems without locks


def acquire(path: Path, reason: str) -> BaseFileLock:
    """Acquire the lock `path`. While another process holds it, wait and log `reason` and the holder.

    On a file system without locks, a file beside `path` serves as the lock. Its holder touches it regularly. If the
    holder dies, the lock is taken over: at once on the same host, after `LEASE_SECONDS` on another.

    Raises:
        OSError: the lock file cannot be opened or locked for another reason.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock: BaseFileLock = _wait_for(FileLock(path, fallback_to_soft=False), reason)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.info("%s: this file system has no locks (%s); a lock file is used", path.parent, os.strerror(error.errno))
        return _wait_for(_lease(path.with_name(f"{path.name}.held")), reason)
    with suppress(OSError):  # waiting processes read from it who holds the lock
        path.write_text(f"pid={os.getpid()}\nhost={socket.gethostname()}\n", encoding="utf-8")
    return lock


def _lease(path: Path) -> SoftFileLease:
    return SoftFileLease(
        path, lease_duration=LEASE_SECONDS, heartbeat_interval=HEARTBEAT_SECONDS, on_compromise=_exit_without_lock
    )


def _exit_without_lock(lost: LeaseCompromise) -> None:
    """End this process, whose lock may have been taken over, for example after it was suspended: two must not write.

    Exiting at once has the effect of a kill, after which the other process resumes the run exactly.
    """
    log.critical("%s was lost (%s): another process may have taken over, so this one ends", lost.lock_file, lost.reason)
    os._exit(1)


def _wait_for(lock: BaseFileLock, reason: str) -> BaseFileLock:
    """Acquire a lock, logging every 30 seconds that another process holds it."""
    started, timeout = time.monotonic(), 0.0  # the first message comes at once
    while True:
        try:
            lock.acquire(timeout=timeout)
            return lock
        except Timeout:
            holder = _holder(Path(lock.lock_file))
            log.info("waiting (%.0f s so far): %s%s", time.monotonic() - started, reason, holder)
            timeout = WAIT_MESSAGE_SECONDS


def _holder(path: Path) -> str:
    """The holder that a lock file names, for a message; "" if it names none. filelock's own files look alike."""
    found = last_holder(path)
    return f" (process {found[0]} on {found[1]})" if found else ""


def last_holder(path: Path) -> tuple[int, str] | None:
    """Process and host that a lock file names, which stay in it after the lock is released; None if it names none."""
    try:
        found = re.search(r"^pid=(\d+)\nhost=(\S+)$", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    except OSError:
        return None
    return (int(found[1]), found[2]) if found else None


def is_held(path: Path) -> bool | None:
    """Whether some process holds the lock `path`; None if that cannot be told from here.

    It cannot where there is no lock file, or where the last holder was on another host and seems to hold it no more:
    not every network file system tells one host of the locks of another.
    """
    with suppress(OSError):
        if time.time() - path.with_name(f"{path.name}.held").stat().st_mtime < LEASE_SECONDS:
            return True
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for a moment, and only if nobody holds it
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(descriptor)
    holder = last_holder(path)
    return None if holder and holder[1] != socket.gethostname() else False
