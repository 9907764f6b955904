"""Stages that others need, built once and shared: `<outputs>/cache/<stage>-<digest of all that determines it>`."""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rlhf import earlier, parallel
from rlhf.files import BEST_MODEL, MODEL, OUTCOME, SUMMARY, read_json, tidy, write_json
from rlhf.tracking import read_summary

log = logging.getLogger(__name__)
WAIT_MESSAGE_SECONDS = 30


def register_run(outputs: Path, identity: str, folder: Path) -> None:
    """Remember where the run of this identity is, unless a finished one is known."""
    if find_run(outputs, identity) is not None:
        return
    pointer = _pointer(outputs, identity)
    pointer.parent.mkdir(parents=True, exist_ok=True)
    write_json(pointer, {"folder": os.path.relpath(folder, pointer.parent)})


def find_run(outputs: Path, identity: str) -> Path | None:
    """The folder of a finished run of this identity, wherever it was made, unless it was deleted or made anew."""
    pointer = _pointer(outputs, identity)
    if not pointer.exists():
        return None
    noted = (pointer.parent / read_json(pointer)["folder"]).resolve()
    for folder in (noted, earlier.place(noted, identity)):  # there, or moved aside since
        summary = read_summary(folder) if folder.is_dir() else None
        if summary is not None and summary.get("identity") == identity:
            return folder
    return None


def _pointer(outputs: Path, identity: str) -> Path:
    return outputs / "cache" / "runs" / f"{identity}.json"


def take_over(found: Path, folder: Path, config: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Make `folder` the same finished run as `found`, by copies of what is small and links to the models.

    `config` and `overrides` are those under which it is known here: another name, another report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in OUTCOME:
        if (found / name).exists():
            shutil.copy2(found / name, folder / name)
    for name in (MODEL, BEST_MODEL):
        if (found / name).exists() and not (folder / name).exists():
            (folder / name).symlink_to(os.path.relpath(found / name, folder), target_is_directory=True)
    summary = {
        **(read_summary(found) or {}),
        "same_as": os.path.relpath(found, folder),
        "config": config,
        "overrides": overrides,
    }
    write_json(folder / SUMMARY, summary)
    return summary


def missing(folder: Path) -> bool:
    """Whether what belongs into a folder is not there, or not whole."""
    return read_summary(folder) is None


def ensure(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, built if it is not there: in a temporary place, under a file lock, renamed when complete.

    A builder that dies leaves its lock to the next one (the system releases it), which continues from the last
    checkpoint, and nothing that could be mistaken for a result. Several processes on one run build together.
    """
    if not parallel.from_first(lambda: missing(folder)):
        return folder
    with locked(folder.parent / f"{folder.name}.lock", f"another process builds {folder.name}"):
        if parallel.from_first(lambda: missing(folder)):
            work = folder.with_name(f".{folder.name}.building")
            work.mkdir(exist_ok=True)  # what a builder that died left is continued from its last checkpoint
            if parallel.from_first(lambda: missing(work)):  # else it died here, with all done
                build(work)
            parallel.from_first(lambda: _put(work, folder))
    return folder


def _put(work: Path, folder: Path) -> None:
    tidy(work)
    shutil.rmtree(work / "checkpoints", ignore_errors=True)  # not before the model is written
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(work, folder)


def name_of(work: Path) -> str:
    """The name that a folder under construction will have."""
    return work.name.removeprefix(".").removesuffix(".building")


@contextmanager
def locked(path: Path, reason: str) -> Iterator[None]:
    """Hold a file lock, which the system releases if we die; while another holds it, wait and say so.

    Of several processes on one run the first holds it for all.
    """
    lock = FileLock(path)
    parallel.from_first(lambda: _acquire(lock, path, reason))
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, path: Path, reason: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    started, timeout = time.monotonic(), 0.0
    while True:
        try:
            lock.acquire(timeout=timeout)
            return
        except Timeout:
            log.info("waiting (%.0f s so far): %s", time.monotonic() - started, reason)
            timeout = WAIT_MESSAGE_SECONDS
