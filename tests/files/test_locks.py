"""Lock files, touched while held, for file systems without locks (such as some network file systems)."""

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import SoftFileLease

from rlhf.files import locks


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS], ids=errno.errorcode.get)
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that refuses every lock."""

    def refuse(*_: Any) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"LEASE_SECONDS": 1.0, "HEARTBEAT_SECONDS": 0.1, "WAIT_MESSAGE_SECONDS": 0.1}.items():
        monkeypatch.setattr(locks, name, seconds)


def test_a_lock_file_excludes_others_where_locks_are_missing(
    no_locks: None, quick: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "sft-1.lock"
    caplog.set_level(logging.INFO)
    lock = locks.acquire(path, "first")
    held = tmp_path / "sft-1.lock.held"
    assert held.exists()
    entered = threading.Event()

    def other() -> None:
        second = locks.acquire(path, "another process builds sft-1")
        entered.set()
        second.release()

    waiting = threading.Thread(target=other)
    waiting.start()
    assert not entered.wait(1.5), "longer than a lease, which the heartbeat keeps"
    lock.release()
    assert entered.wait(5)
    waiting.join()
    assert not held.exists()
    assert f"another process builds sft-1 (process {os.getpid()} on " in caplog.text


def hold_for_ever(path: Path) -> None:
    fcntl.flock = lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "none"))  # type: ignore[assignment]
    lock = locks.acquire(path, "first")
    path.with_name("begun").touch()
    time.sleep(600)
    lock.release()


def leave_by_kill(path: Path) -> None:
    other = multiprocessing.get_context("fork").Process(target=hold_for_ever, args=(path,))
    other.start()
    while not path.with_name("begun").exists():
        time.sleep(0.02)
    other.kill()
    other.join()


@pytest.mark.parametrize("no_locks", [errno.ENOLCK], indirect=True)
def test_a_lock_file_of_a_process_killed_here_is_taken_over_at_once(no_locks: None, tmp_path: Path) -> None:
    leave_by_kill(tmp_path / "lock")
    assert (tmp_path / "lock.held").exists()
    started = time.monotonic()
    locks.acquire(tmp_path / "lock", "").release()
    assert time.monotonic() - started < 5  # instead of the five minutes of LEASE_SECONDS


@pytest.mark.parametrize("no_locks", [errno.ENOLCK], indirect=True)
def test_a_lock_file_of_another_host_is_taken_over_once_it_is_silent(
    no_locks: None, quick: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    leave_by_kill(tmp_path / "lock")
    held = tmp_path / "lock.held"
    held.write_text(held.read_text().replace(os.uname().nodename, "elsewhere"))
    started = time.monotonic()
    locks.acquire(tmp_path / "lock", "somebody works there").release()
    assert 0.9 < time.monotonic() - started < 5
    assert "somebody works there (process " in caplog.text
    assert " on elsewhere" in caplog.text


def test_a_process_that_lost_its_lock_file_stops(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: left.set())
    lock = locks._lease(tmp_path / "lock.held")
    assert isinstance(lock, SoftFileLease)
    lock.acquire()
    (tmp_path / "lock.held").unlink()
    assert left.wait(5)
    lock.release()


def test_other_lock_errors_do_not_lead_to_lock_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        locks.acquire(tmp_path / "lock", "")
    assert json.dumps(sorted(path.name for path in tmp_path.iterdir())) == '["lock"]'
