"""A pytest plugin that says at the end which files took the processor's time, so that the suite does not grow unseen.

The time is that of each test with its fixtures and the processes that it waited for. Unlike the clock's, it depends
little on what else the machine does.
"""

import os
from collections import Counter
from collections.abc import Iterator

import pytest

SHOWN = 15  # files
STARTED = pytest.StashKey[float]()
NAME = "processor_seconds"  # of a test, in its report
spent: Counter[str] = Counter()  # file → seconds


def processor_seconds() -> float:
    """Of this process and of the processes that it has waited for."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    item.stash[STARTED] = processor_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    try:
        return (yield)
    finally:
        item.user_properties.append((NAME, processor_seconds() - item.stash[STARTED]))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Called where the summary is made, for the tests of all workers."""
    if report.when == "teardown":
        spent[report.location[0]] += sum(value for name, value in report.user_properties if name == NAME)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section(f"{sum(spent.values()) / 60:.1f} minutes of the processor's time")
    for file, seconds in spent.most_common(SHOWN):
        if seconds >= 1:
            terminalreporter.write_line(f"{seconds:6.0f} s  {file}")
