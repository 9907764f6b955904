"""What goes wrong: every exception of ours, each told in one sentence, and the exit codes of the commands.

A sentence names what is wrong (the key, the file, the row), its value, and what is allowed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

STOPPED = 3  # exit code: a guard ended the run

INTERRUPTED = 75  # exit code, EX_TEMPFAIL of sysexits.h: try again later


class ConfigError(Exception):
    """A configuration that cannot run, explained in one sentence: key, value, what is allowed."""


class Interrupted(Exception):  # noqa: N818  (nothing went wrong)
    """A run that was asked to stop and has saved its state."""


class WorkerFailed(Exception):  # noqa: N818
    """A run that failed in processes of its own, which have said why; `code` is what they exited with."""

    def __init__(self, code: int):
        super().__init__(f"a process of the run ended with exit code {code}")
        self.code = code


class GuardStop(Exception):  # noqa: N818  (the error is the run's, not the program's)
    """A run that a guard ended, in one sentence: what happened, the usual cause, what to try."""


class DamagedError(ValueError):
    """A file of ours that does not hold what it should, explained in one sentence."""


class ModelError(Exception):
    """A model or tokenizer that cannot be used as configured, explained in one sentence."""


def first_line(error: BaseException) -> str:
    """What an error of another library says first: the rest is advice for other programs."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


@contextmanager
def explained(failure: str) -> Iterator[None]:
    """For calls that read a model's files: whatever goes wrong there is about these files.

    Raises:
        ModelError: `failure`, and what the library said first.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{failure} ({type(error).__name__}: {first_line(error)})") from error


class DataError(Exception):
    """Bad or missing data, explained in one sentence that names the file or the split."""


class RowError(Exception):
    """Why a row cannot be used, in words that fit many rows: rows are counted by reason."""


class RunError(Exception):
    """A run that cannot be used as asked, explained in one sentence."""


class NoRunsError(Exception):
    """A folder that holds nothing to report on; the message is one sentence."""


class FigureError(ValueError):
    """A figure that the layout describes wrongly; the message is one sentence."""


class EndpointRefused(Exception):  # noqa: N818  (one question fewer)
    """The endpoint answers others, but not this request; `parameter` is the key of `sampling` that it does not take."""

    def __init__(self, reason: str, parameter: str | None = None):
        super().__init__(reason)
        self.parameter = parameter
