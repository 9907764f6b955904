"""SHA-256 digests of files and folders, cached so that a large file is not read again at every start."""

import hashlib
import json
import logging
import os
import time
from contextlib import suppress
from pathlib import Path

from rlhf.files import write_json

log = logging.getLogger(__name__)
LARGE = 2**30  # bytes: reading a larger file takes long enough to be logged
RACY_SECONDS = 2.0  # two changes within this time may have the same timestamps on some file systems


def content_digest(path: Path, known: Path | None = None) -> str:
    """Hex digest of a file's bytes, or of the names and bytes of the files directly in a folder.

    Of a folder, files whose name begins with a dot and logs (`*.log`), which a run may still be writing, are ignored.

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
    listed = [(file.name, _file_digest(file.resolve(), known)) for file in files if file.suffix != ".log"]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Hex SHA-256 digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_digest(path: Path, known: Path | None) -> str:
    """The digest of one file, from the cache `known` if it holds it."""
    note = known / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json" if known else None
    stamp = _stamp(path)
    if note is not None:
        with suppress(OSError, ValueError, TypeError, KeyError):
            kept = json.loads(note.read_text(encoding="utf-8"))
            if kept["stamp"] == stamp:
                return str(kept["sha256"])
    if stamp[0] >= LARGE:
        log.info("reading %s once for its digest (%.1f GiB)", path, stamp[0] / 2**30)
    digest = sha256(path)
    settled = time.time() - max(stamp[1:3]) / 1e9 > RACY_SECONDS
    if note is not None and settled and _stamp(path) == stamp:
        with suppress(OSError):  # if the cache cannot be written, the file is read again next time
            note.parent.mkdir(parents=True, exist_ok=True)
            write_json(note, {"path": str(path), "stamp": stamp, "sha256": digest})
    return digest


def _stamp(path: Path) -> list[int]:
    """Size, times of the last change of content and inode (a program cannot set the latter back), inode, device."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]
