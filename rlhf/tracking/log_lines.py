"""How a log record looks on a terminal; in the log file of a run it keeps date, module and level."""

import logging

TIME = "%H:%M:%S"
BELOW = "\n" + " " * len("12:00:00 ")  # further lines of a message begin below its first


class LogLine(logging.Formatter):
    """The time and the message, and from warnings on the level: `12:00:00 warning: …`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", TIME)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """The first line and what is below it."""
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"{record.asctime} {level}{record.message}".replace("\n", BELOW)
