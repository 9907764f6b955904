"""The exceptions of this package, and the exit codes of its commands.

The message of a `UserError` is one sentence that names what is wrong (the key, the file, the row), its value, and what
is allowed. `rlhf.errors.explaining` turns errors into such sentences, `rlhf.errors.machine` does so for a full disk and
the like, and `rlhf.errors.keys` for a config key that does not exist.
"""

from collections.abc import Iterator
from contextlib import contextmanager

# Exit codes; 0 is success
FAILURE = 1  # the machine failed (in one sentence), or the program did (with a traceback)
MISTAKE = 2  # a configuration, data set, model or folder that cannot be used
STOPPED = 3  # a guard stopped the run
INTERRUPTED = 75  # stopped early, can be continued: EX_TEMPFAIL of sysexits.h, "try again later"
KEYBOARD = 130  # Ctrl-C without saving, as shells report it


class UserError(Exception):
    """An error that the user can mend; its message is one sentence, shown without a traceback."""


class ConfigError(UserError):
    """A configuration that cannot run: names the key, its value and what is allowed."""


class DataError(UserError):
    """Missing or unusable data: names the file or the split."""


class ModelError(UserError):
    """A model or tokenizer that cannot be used as configured."""


class RunError(UserError):
    """The folder of a run that cannot be used as asked."""


class DamagedError(UserError, ValueError):
    """A file written by this package that no longer holds what it should."""


class NoRunsError(UserError):
    """A folder without any run to report on."""


class FigureError(UserError, ValueError):
    """A figure of the report with an invalid description in `report.figures`."""


class GuardStop(UserError):  # noqa: N818  (the run is at fault, not the program)
    """A run that a guard stopped: says what happened, the usual cause and what to try."""


class Interrupted(Exception):  # noqa: N818  (nothing went wrong)
    """A run that stopped early and can be continued: after a signal, or because an endpoint cannot be reached."""


class WorkerFailed(Exception):  # noqa: N818
    """A run with several processes of which one failed; the process has printed the reason itself.

    Attributes:
        code: exit code of that process; negative if a signal ended it.
    """

    def __init__(self, code: int):
        super().__init__(f"a process of the run ended with exit code {code}")
        self.code = code


class RowError(Exception):
    """A row that cannot be used; the message is a reason that many rows can share, because rows are counted by it."""


class EndpointRefused(Exception):  # noqa: N818  (the client goes on without this request)
    """An endpoint that works but refuses one request.

    Attributes:
        parameter: the key of `sampling` that the endpoint does not accept, if it named one.
    """

    def __init__(self, reason: str, parameter: str | None = None):
        super().__init__(reason)
        self.parameter = parameter


def first_line(error: BaseException) -> str:
    """The first line of an error of another library (two if the first ends in a colon): the rest is advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


@contextmanager
def explained(failure: str) -> Iterator[None]:
    """Raise any error inside the block as a ModelError, for calls in which only the model's files can be at fault.

    Raises:
        ModelError: `failure`, then type and first line of the original error in parentheses.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{failure} ({type(error).__name__}: {first_line(error)})") from error


def missing_package(what: str, package: str, extra: str) -> str:
    """The sentence for a missing package of an optional extra, which is installed from the checkout.

    The name `rlhf` on PyPI belongs to another project, so no message may tell anybody to install that.
    """
    return f"{what} needs the package {package}: pip install -e '.[{extra}]' in the checkout"
