"""Models and comparisons that runs share, each built once: `<outputs>/cache/<product>-<digest>`."""

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
from rlhf.files import BEST_MODEL, EVALUATIONS, KEPT, MODEL, OUTCOME, SUMMARY, locks, read_object, tidy, write_json
from rlhf.files.checksums import damage
from rlhf.pipeline import earlier
from rlhf.pipeline.identity import measured_as
from rlhf.tracking.metrics_table import TABLE
from rlhf.tracking.reading import renamed_config
from rlhf.tracking.summary import read_summary

log = logging.getLogger(__name__)


def register_run(outputs: Path, identity: str, folder: Path) -> None:
    """Record where the run of this identity is, unless a finished one is known or the cache cannot be written to."""
    if find_run(outputs, identity) is not None:
        return
    pointer = _pointer(outputs, identity)
    try:
        pointer.parent.mkdir(parents=True, exist_ok=True)
        write_json(pointer, {"folder": os.path.relpath(folder, pointer.parent)})
    except OSError as error:
        log.warning("%s: %s, so that this run will not be found under another name", pointer, error.strerror)


def find_run(outputs: Path, identity: str) -> Path | None:
    """The folder of a finished run of this identity, under any name; None if there is none any more."""
    pointer = _pointer(outputs, identity)
    try:
        if not pointer.exists():
            return None
        noted = (pointer.parent / read_object(pointer, folder=str)["folder"]).resolve()
        for folder in (noted, earlier.place(noted, identity)):  # still there, or moved aside since
            summary = read_summary(folder) if folder.is_dir() else None
            if summary is not None and summary.get("identity") == identity:
                return folder
    except (DamagedError, OSError) as error:
        log.warning("%s: left out (%s)", pointer, error)
    return None


def _pointer(outputs: Path, identity: str) -> Path:
    return outputs / "cache" / "runs" / f"{identity}.json"


def check_whole(found: Path) -> None:
    """Check the models of a finished run before it is taken over.

    Raises:
        ModelError: they are damaged.
    """
    wrong = damage(found)
    if wrong:
        raise ModelError(
            f"{found} is the same run, but damaged: {wrong}; with its {SUMMARY} moved away, its own command makes it"
            " whole"
        )


def take_over(found: Path, folder: Path, config: dict[str, Any], overrides: list[str], **more: Any) -> dict[str, Any]:
    """Make `folder` the same finished run as `found`: small files are copied, models are linked.

    `config` and `overrides` are the new run's own, which may differ in its name and its report. What only measures is
    in both as `found` was measured; `more` are further entries of the summary. The caller has checked that `found` is
    whole and that `folder` holds no run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*OUTCOME, TABLE):
        if (found / name).exists():
            shutil.copy2(found / name, folder / name)
    if (found / EVALUATIONS).is_dir():
        shutil.copytree(found / EVALUATIONS, folder / EVALUATIONS)
    for name in (MODEL, BEST_MODEL, KEPT):
        if (found / name).exists():
            (folder / name).symlink_to(os.path.relpath(found / name, folder), target_is_directory=True)
    made = read_summary(found) or {}
    summary = {
        **made,
        "same_as": os.path.relpath(found, folder),
        "config": measured_as(config, renamed_config(made.get("config") or {})),
        "overrides": overrides,
        **more,
    }
    write_json(folder / SUMMARY, summary)
    return summary


def missing(folder: Path) -> bool:
    """Whether a cached folder is absent or damaged."""
    return not folder.exists() or _wrong(folder) is not None


def known(folder: Path) -> bool:
    """Whether a cached folder is there, judging by its summary alone, which is enough for a preview."""
    try:
        return read_summary(folder) is not None
    except DamagedError:
        return False


def _wrong(folder: Path) -> str | None:
    """Why a cached folder cannot be used; None if it can."""
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
    """Check that missing folders can be built here, before any of them is.

    Raises:
        ConfigError: the cache belongs to somebody else, or its disk is read-only.
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
    """Return `folder`, building it if it is missing: in a temporary place, under a file lock, renamed when complete.

    If a builder dies, the system releases its lock, and the next builder continues from the last checkpoint; a folder
    under its final name is always complete. The processes of one run build together. A damaged folder is moved to
    `damaged/` and built again.
    """
    if not collectives.on_rank_zero(lambda: missing(folder)):
        return folder
    with locked(folder.parent / f"{folder.name}.lock", f"another process builds {folder.name}"):
        if collectives.on_rank_zero(lambda: missing(folder)):
            collectives.on_rank_zero(
                lambda: move_damaged(folder, folder.parent / "damaged", f"{_wrong(folder)}, so it is built again")
            )
            work = _work(folder)
            work.mkdir(exist_ok=True)  # it may hold checkpoints of a builder that died
            if collectives.on_rank_zero(lambda: missing(work)):  # otherwise that builder died just before renaming it
                build(work)
            collectives.on_rank_zero(lambda: _put(work, folder))
    return folder


def _work(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.building")


def move_damaged(folder: Path, place: Path, then: str) -> None:
    """Move a damaged folder into `place`, under its name or a numbered one; `then` says what happens next."""
    if not folder.exists():
        return
    place.mkdir(exist_ok=True)
    names = (place / f"{folder.name}{suffix}" for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
    target = next(path for path in names if not path.exists())
    log.warning("%s is damaged: it is moved to %s; %s", folder, target, then)
    os.replace(folder, target)


def _put(work: Path, folder: Path) -> None:
    tidy(work)
    shutil.rmtree(work / "checkpoints", ignore_errors=True)  # the model is written by now
    os.replace(work, folder)


def name_of(work: Path) -> str:
    """The final name of a folder under construction."""
    return work.name.removeprefix(".").removesuffix(".building")


@contextmanager
def locked(path: Path, reason: str) -> Iterator[None]:
    """Hold a file lock (`rlhf.files.locks`), which is released if this process dies; wait while another one holds it.

    `reason` is logged while waiting. The first process of a run holds the lock for all of them.
    """
    held: list[BaseFileLock] = []
    collectives.on_rank_zero(lambda: held.append(locks.acquire(path, reason)))
    try:
        yield
    finally:
        for lock in held:
            lock.release()
