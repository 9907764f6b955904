"""Failures of the user's own functions and classes: named with file, line and function."""

import sysconfig
import traceback
from pathlib import Path

from rlhf import PACKAGE

# The code of others: Python's own library and installed packages. What is left is ours or the user's.
LIBRARIES = tuple({Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def failure_in_users_code(error: BaseException) -> str | None:
    """One sentence if the user's code raised `error`, itself or through a library that it called; None otherwise."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if not path.is_file() or any(path.resolve().is_relative_to(folder) for folder in LIBRARIES):
            continue
        if path.resolve().is_relative_to(PACKAGE):
            return None
        what = " ".join(str(error).split())
        return f"{path}, line {frame.lineno}, in {frame.name}: {type(error).__name__}{f': {what}' if what else ''}"
    return None
