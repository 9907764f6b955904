"""Failures of the machine rather than of the program: a full disk, a read-only folder, too many open files."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ERRNOS = {
    getattr(errno, name)
    for name in (
        "ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ESTALE", "EMFILE", "ENFILE", "ENOMEM",
        "ENOLCK", "EOPNOTSUPP", "ENOSYS",
    )
}  # fmt: skip
_SQLITE_ERRORS = ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_BUSY",
                  "SQLITE_LOCKED", "SQLITE_PROTOCOL", "SQLITE_CORRUPT", "SQLITE_NOTADB")  # fmt: skip


def machine_failure(error: BaseException) -> str | None:
    """One sentence if `error`, or an error that caused it, is a failure of the machine; None for any other error."""
    for link in _chain(error):
        number = _errno(link)
        if number is not None and number in _ERRNOS:
            file = getattr(link, "filename", None)
            what = f"{os.strerror(number)}: {file}" if file else os.strerror(number)
        elif getattr(link, "sqlite_errorname", "").startswith(_SQLITE_ERRORS):
            what = f"an SQLite database: {link}"
        else:
            continue
        return f"{what} (once this is mended, the same command continues)"
    return None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Add `path` to a failure of the machine that names no file, which is what most libraries raise on a full disk.

    Raises:
        OSError: the failure, with `path` as its file name.
    """
    try:
        yield
    except Exception as error:
        found = [(_errno(link), getattr(link, "filename", None)) for link in _chain(error)]
        number, file = next(((number, file) for number, file in found if number in _ERRNOS), (None, None))
        if number is None or file:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _errno(error: BaseException) -> int | None:
    """The `errno` of an OSError; libraries written in Rust only mention it in the message of another exception."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, its cause or context, the cause of that, and so on."""
    seen: set[int] = set()  # the chain is a circle if the cause of an error was raised again
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
