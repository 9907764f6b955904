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


def _of_file(path: Path, known: Path | None) -> str:
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
        with suppress(OSError):  # a cache that cannot be written to costs the reading next time
            note.parent.mkdir(parents=True, exist_ok=True)
            write_json(note, {"path": str(path), "stamp": stamp, "sha256": digest})
    return digest


def _stamp(path: Path) -> list[int]:
    """Size, time of the last change of the content and of the inode (which nobody can set back), inode, device."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]
