"""Stages that others need, built once and shared: `<outputs>/cache/<stage>-<digest of all that determines it>`."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import BaseFileLock

from rlhf.distributed import collectives
from rlhf.errors import ConfigError, DamagedError, ModelError
from rlhf.files import BEST_MODEL, MODEL, OUTCOME, SUMMARY, locks, read_object, tidy, write_json
from rlhf.files.checksums import damage
from rlhf.pipeline import earlier
from rlhf.tracking.summary import read_summary

log = logging.getLogger(__name__)


def register_run(outputs: Path, identity: str, folder: Path) -> None:
    """Remember where the run of this identity is, unless a finished one is known or the cache is somebody else's."""
    if find_run(outputs, identity) is not None:
        return
    pointer = _pointer(outputs, identity)
    try:
        pointer.parent.mkdir(parents=True, exist_ok=True)
        write_json(pointer, {"folder": os.path.relpath(folder, pointer.parent)})
    except OSError as error:
        log.warning("%s: %s, so that this run will not be found under another name", pointer, error.strerror)


def find_run(outputs: Path, identity: str) -> Path | None:
    """The folder of a finished run of this identity, wherever it was made, unless it was deleted or made anew."""
    pointer = _pointer(outputs, identity)
    try:
        if not pointer.exists():
            return None
        noted = (pointer.parent / read_object(pointer, folder=str)["folder"]).resolve()
        for folder in (noted, earlier.place(noted, identity)):  # there, or moved aside since
            summary = read_summary(folder) if folder.is_dir() else None
            if summary is not None and summary.get("identity") == identity:
                return folder
    except (DamagedError, OSError) as error:
        log.warning("%s: left out (%s)", pointer, error)
    return None


def _pointer(outputs: Path, identity: str) -> Path:
    return outputs / "cache" / "runs" / f"{identity}.json"


def take_over(found: Path, folder: Path, config: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Make `folder` the same finished run as `found`, by copies of what is small and links to the models.

    `config` and `overrides` are those under which it is known here: another name, another report.

    Raises:
        ModelError: its models are damaged.
    """
    wrong = damage(found)
    if wrong:
        raise ModelError(
            f"{found} is the same run, but damaged: {wrong}; with its {SUMMARY} moved away, its own command makes it"
            " whole"
        )
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
    """Whether what belongs into a cached folder is not there, or not whole."""
    return not folder.exists() or _wrong(folder) is not None


def known(folder: Path) -> bool:
    """Whether a cached folder is there, by its summary alone, which is enough for a preview."""
    try:
        return read_summary(folder) is not None
    except DamagedError:
        return False


def _wrong(folder: Path) -> str | None:
    """Why a cached folder cannot be used."""
    try:
        summary = read_summary(folder)
    except DamagedError as error:
        return str(error)
    if summary is None:
        return f"{SUMMARY} is gone"
    stage = summary.get("stage")
    if stage in ("sft", "reward") and not (folder / MODEL).is_dir():
        return f"{MODEL} is gone"
    if stage == "reward" and not isinstance(summary["metrics"].get("reward/baseline"), float | int):
        return f"{SUMMARY} does not say 'reward/baseline'"
    return damage(folder)


def check_writable(folders: Sequence[Path]) -> None:
    """See whether what is missing can be built here, before anything is.

    Raises:
        ConfigError: the cache is somebody else's, or its disk read-only.
    """
    for folder in folders:
        there = next(place for place in (folder.parent, *folder.parents) if place.exists())
        lock, work = folder.parent / f"{folder.name}.lock", _work(folder)
        refused = [place for place in (there, lock, work) if place.exists() and not _may_write(place)]
        if refused:
            raise ConfigError(
                f"output_dir: {folder.name} is missing or damaged in {folder.parent}, and cannot be built there, as "
                f"{refused[0]} cannot be written; allowed: an output_dir of your own"
            )


def _may_write(path: Path) -> bool:
    return os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def ensure(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, built if it is not there: in a temporary place, under a file lock, renamed when complete.

    A builder that dies leaves its lock to the next one (the system releases it), which continues from the last
    checkpoint, and nothing that could be mistaken for a result. Several processes on one run build together. What is
    there but damaged is moved to `damaged/` and built again.
    """
    if not collectives.on_rank_zero(lambda: missing(folder)):
        return folder
    with locked(folder.parent / f"{folder.name}.lock", f"another process builds {folder.name}"):
        if collectives.on_rank_zero(lambda: missing(folder)):
            collectives.on_rank_zero(lambda: _move_damaged(folder))
            work = _work(folder)
            work.mkdir(exist_ok=True)  # what a builder that died left is continued from its last checkpoint
            if collectives.on_rank_zero(lambda: missing(work)):  # else it died here, with all done
                build(work)
            collectives.on_rank_zero(lambda: _put(work, folder))
    return folder


def _work(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.building")


def _move_damaged(folder: Path) -> None:
    if not folder.exists():
        return
    kept = folder.parent / "damaged"
    kept.mkdir(exist_ok=True)
    names = (kept / f"{folder.name}{suffix}" for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
    target = next(path for path in names if not path.exists())
    log.warning("%s is damaged (%s): it is moved to %s and built again", folder, _wrong(folder), target)
    os.replace(folder, target)


def _put(work: Path, folder: Path) -> None:
    tidy(work)
    shutil.rmtree(work / "checkpoints", ignore_errors=True)  # not before the model is written
    os.replace(work, folder)


def name_of(work: Path) -> str:
    """The name that a folder under construction will have."""
    return work.name.removeprefix(".").removesuffix(".building")


@contextmanager
def locked(path: Path, reason: str) -> Iterator[None]:
    """Hold a file lock (`rlhf.files.locks`), which is released if we die; while another holds it, wait and say so.

    Of several processes on one run the first holds it for all.
    """
    held: list[BaseFileLock] = []
    collectives.on_rank_zero(lambda: held.append(locks.acquire(path, reason)))
    try:
        yield
    finally:
        for lock in held:
            lock.release()
