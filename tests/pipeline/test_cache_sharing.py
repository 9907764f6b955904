"""A cache that several users or processes share: permissions, groups, and a builder that dies."""

import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlhf.errors import ConfigError
from rlhf.errors.machine import machine_failure
from rlhf.files import copy_folder, locks, write_json
from rlhf.pipeline import cache


@contextmanager
def as_another_user() -> Iterator[None]:
    """Become the user nobody if root, who may write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def passable(folder: Path) -> None:
    """Let every user pass through pytest's folders to this one."""
    top = Path(tempfile.gettempdir())
    for parent in (folder, *folder.parents):
        if top in parent.parents:
            parent.chmod(0o755)


def built(folder: Path) -> None:
    write_json(folder / "summary.json", {"metrics": {}})


def test_a_cache_of_another_user_is_read_and_never_written(tmp_path: Path) -> None:
    passable(tmp_path)
    mine = cache.ensure(tmp_path / "cache" / "sft-1", built)
    (tmp_path / "cache").chmod(0o555)
    with as_another_user():
        assert cache.ensure(mine, built) == mine  # reading needs no lock
        with pytest.raises(PermissionError) as failure:
            cache.ensure(tmp_path / "cache" / "sft-2", built)
    assert "sft-2.lock" in machine_failure(failure.value)


def test_what_is_missing_in_a_cache_of_another_user_is_said_before_anything_is_built(tmp_path: Path) -> None:
    passable(tmp_path)
    folder = tmp_path / "cache" / "sft-2"
    cache.check_writable([folder])
    folder.parent.mkdir()
    folder.parent.chmod(0o555)
    with as_another_user(), pytest.raises(ConfigError, match=f"sft-2 is missing .* {folder.parent} cannot be written"):
        cache.check_writable([folder])
    folder.parent.chmod(0o777)  # another user has begun to build it
    for begun in (folder.parent / "sft-2.lock", folder.parent / ".sft-2.building"):
        begun.touch(0o644)
        with as_another_user(), pytest.raises(ConfigError, match=f"{begun.name} cannot be written"):
            cache.check_writable([folder])
        begun.unlink()


def test_a_run_finishes_although_its_pointer_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    passable(tmp_path)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o555)
    for _ in range(2):  # without and with a folder for pointers
        with as_another_user():
            cache.register_run(tmp_path, "abc", tmp_path / "run")
        assert "Permission denied, so that this run will not be found" in caplog.text
        caplog.clear()
        (tmp_path / "cache" / "runs").mkdir(mode=0o755, exist_ok=True)
    assert not list((tmp_path / "cache" / "runs").iterdir())
    with as_another_user():
        assert cache.find_run(tmp_path, "abc") is None


def test_another_users_model_is_checked_and_no_note_is_left(tmp_path: Path) -> None:
    passable(tmp_path)
    folder = tmp_path / "cache" / "preferences-1"
    folder.mkdir(parents=True)
    built(folder)
    (folder / "preference.jsonl").write_text("{}\n")
    folder.chmod(0o555)
    with as_another_user():
        assert not cache.missing(folder)
    assert not (folder / "checksums.json").exists()
    assert not cache.missing(folder)  # this process has checked it already


def test_a_copy_of_a_read_only_model_is_writable(tmp_path: Path) -> None:
    source, target = tmp_path / "sft-1", tmp_path / "run"
    (source / "model").mkdir(parents=True)
    for name in ("summary.json", "model/config.json"):
        (source / name).write_text("{}")
        (source / name).chmod(0o444)
    for folder in (source / "model", source):
        folder.chmod(0o555)
    target.mkdir()
    copy_folder(source, target)
    for path in (target, *target.rglob("*")):
        assert path.stat().st_mode & 0o200, path
    assert (target / "model" / "config.json").read_text() == "{}"


def test_a_cache_folder_of_a_group_is_written_by_all_of_it(tmp_path: Path) -> None:
    """With a umask of 002 in a setgid folder, locks and results can be written by the whole group."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o2775)
    before = os.umask(0o002)
    try:
        cache.ensure(tmp_path / "cache" / "sft-1", built)
    finally:
        os.umask(before)
    for path in (tmp_path / "cache").rglob("*"):
        assert path.stat().st_mode & 0o020, path


def test_a_builder_that_waits_says_so_and_takes_over_from_a_dead_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "WAIT_MESSAGE_SECONDS", 0.1)
    folder = tmp_path / "cache" / "sft-1"
    half = folder.parent / ".sft-1.building" / "half"

    def build_for_ever(work: Path) -> None:
        (work / "half").touch()
        time.sleep(600)

    other = multiprocessing.get_context("fork").Process(target=cache.ensure, args=(folder, build_for_ever))
    other.start()
    while not half.exists():
        assert other.is_alive()
        time.sleep(0.02)
    said: list[str] = []

    class KillWhenWaitedFor(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())
            if len(said) == 3:
                other.kill()

    handler = KillWhenWaitedFor()
    monkeypatch.setattr(locks.log, "level", logging.INFO)
    locks.log.addHandler(handler)
    try:
        cache.ensure(folder, lambda work: built(work) if (work / "half").exists() else pytest.fail("begun anew"))
    finally:
        locks.log.removeHandler(handler)
        other.kill()
        other.join()
    assert len(said) >= 3
    assert all(f"another process builds sft-1 (process {other.pid} on " in line for line in said)
    assert sorted(path.name for path in folder.iterdir()) == ["half", "summary.json"]
    assert not half.parent.exists()
