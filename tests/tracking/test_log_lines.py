"""Log records on a terminal: short, and tables below each other."""

import logging
import re

from rlhf.tracking.log_lines import LogLine


def line(level: int, message: str) -> str:
    return LogLine().format(logging.LogRecord("rlhf.module", level, "file.py", 1, message, (), None))


def test_a_line_has_the_time_and_only_a_warning_its_level() -> None:
    assert re.fullmatch(r"\d\d:\d\d:\d\d training", line(logging.INFO, "training"))
    assert re.fullmatch(r"[\d:]{8} warning: no row", line(logging.WARNING, "no row"))
    assert re.fullmatch(r"[\d:]{8} error: no disk", line(logging.ERROR, "no disk"))


def test_further_lines_begin_below_the_first() -> None:
    first, second = line(logging.INFO, "pairs  right %\n   12     50.0").splitlines()
    assert first.index("pairs") + 3 == second.index("12")
