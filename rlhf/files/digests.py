"""SHA-256 digests of files and folders, cached so that a large file is not read again at every start."""

import hashlib
import json
import logging
import os
import time
from contextlib import suppress
from pathlib import Path

from rlhf.errors import DamagedError
from rlhf.files import CHECKSUMS, read_object, write_json

log = logging.getLogger(__name__)
LARGE = 2**30  # bytes: reading a larger file takes long enough to be logged
RACY_SECONDS = 2.0  # two changes within this time may have the same timestamps on some file systems


def content_digest(path: Path, known: Path | None = None) -> str:
    """Hex digest of a file's bytes, or of the names and bytes of the files directly in a folder.

    Of a folder, files whose name begins with a dot and logs (`*.log`), which a run may still be writing, are ignored.
    So is when the models of a run were last found intact, which is noted beside their checksums.

    Args:
        path: a file or folder.
        known: a folder that caches digests. A cached digest is used if the file's size, times and inode are unchanged.
            None is cached for a file that changed a moment ago, as another change might leave the same times.

    Raises:
        OSError: a file cannot be read.
    """
    if not path.is_dir():
        return _file_digest(path.resolve(), known)
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    listed = [(file.name, _listed_digest(file.resolve(), known)) for file in files if file.suffix != ".log"]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Hex SHA-256 digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_stamp(path: Path, *, device: bool = False) -> list[int]:
    """Size in bytes, modification time and inode change time in ns, inode number, and with `device` the device number.

    A program that changes a file changes its stamp: unlike the modification time, the inode change time cannot be set
    back. The device number differs between machines that mount the same network folder, so leave it out of stamps that
    several machines share.
    """
    stat = path.stat()
    stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    return [*stamp, stat.st_dev] if device else stamp


def _listed_digest(path: Path, known: Path | None) -> str:
    """The digest of one file of a folder; of `checksums.json`, that of the checksums alone."""
    if path.name == CHECKSUMS:
        with suppress(DamagedError, KeyError, TypeError):
            checksums = {name: entry["sha256"] for name, entry in read_object(path).items()}
            return hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()
    return _file_digest(path, known)


def _file_digest(path: Path, known: Path | None) -> str:
    """The digest of one file, from the cache `known` if it holds it."""
    note = known / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json" if known else None
    stamp = file_stamp(path, device=True)
    if note is not None:
        with suppress(OSError, ValueError, TypeError, KeyError):
            kept = json.loads(note.read_text(encoding="utf-8"))
            if kept["stamp"] == stamp:
                return str(kept["sha256"])
    if stamp[0] >= LARGE:
        log.info("reading %s once for its digest (%.1f GiB)", path, stamp[0] / 2**30)
    digest = sha256(path)
    settled = time.time() - max(stamp[1:3]) / 1e9 > RACY_SECONDS
    if note is not None and settled and file_stamp(path, device=True) == stamp:
        with suppress(OSError):  # if the cache cannot be written, the file is read again next time
            note.parent.mkdir(parents=True, exist_ok=True)
            write_json(note, {"path": str(path), "stamp": stamp, "sha256": digest})
    return digest
