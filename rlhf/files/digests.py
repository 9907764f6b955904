"""Files known by their content: SHA-256 digests, kept so that a large file is read once and not at each start."""

import hashlib
import json
import logging
import os
import time
from contextlib import suppress
from pathlib import Path

from rlhf.files import write_json

log = logging.getLogger(__name__)
LARGE = 2**30  # bytes: reading so much takes long enough to say so
RACY_SECONDS = 2.0  # file systems may give two changes within this time the same stamp


def content_digest(path: Path, known: Path | None = None) -> str:
    """Hex digest of a file's bytes, or of the names and bytes of the files in a folder (those in folders below it not).

    `known` is a folder of earlier digests. One of them stands for a file whose size, times and inode are unchanged, and
    is not kept for a file that changed a moment ago, as another change could hide behind the same times. Names that
    begin with a dot are left out of a folder, and so is what a run writes about itself while it goes on.

    Raises:
        OSError: the file cannot be read.
    """
    if not path.is_dir():
        return _of_file(path.resolve(), known)
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    listed = [(file.name, _of_file(file.resolve(), known)) for file in files if file.suffix != ".log"]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Of a file's content."""
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


def _of_file(path: Path, known: Path | None) -> str:
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
        with suppress(OSError):  # a cache that cannot be written to costs the reading next time
            note.parent.mkdir(parents=True, exist_ok=True)
            write_json(note, {"path": str(path), "stamp": stamp, "sha256": digest})
    return digest
