"""Failures of the machine and not of the program: a full disk, a forbidden folder, too many open files."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OF_THE_MACHINE = {
    getattr(errno, name)
    for name in (
        "ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ESTALE", "EMFILE", "ENFILE", "ENOMEM",
        "ENOLCK", "EOPNOTSUPP", "ENOSYS",
    )
}  # fmt: skip
_OF_THE_DATABASE = ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_BUSY",
                    "SQLITE_LOCKED", "SQLITE_PROTOCOL", "SQLITE_CORRUPT", "SQLITE_NOTADB")  # fmt: skip


def of_the_machine(error: BaseException) -> str | None:
    """One sentence for a failure of the machine, whichever library it came through; None for any other error."""
    for link in _chain(error):
        number = _errno(link)
        if number is not None and number in _OF_THE_MACHINE:
            file = getattr(link, "filename", None)
            what = f"{os.strerror(number)}: {file}" if file else os.strerror(number)
        elif getattr(link, "sqlite_errorname", "").startswith(_OF_THE_DATABASE):
            what = f"an SQLite database: {link}"
        else:
            continue
        return f"{what} (once this is mended, the same command continues)"
    return None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name what is written here in a failure of the machine that names no file, as those of most libraries do."""
    try:
        yield
    except Exception as error:
        found = [(_errno(link), getattr(link, "filename", None)) for link in _chain(error)]
        number, file = next(((n, file) for n, file in found if n in _OF_THE_MACHINE), (None, None))
        if number is None or file:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _errno(error: BaseException) -> int | None:
    """The system's number of an error; libraries written in Rust put it into the text."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from or while handling: a circle where the cause of one was raised again."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
