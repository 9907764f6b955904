"""The display of a sweep while it runs: a live table on a terminal, or a line now and then elsewhere.

It reads the files of the runs, as `rlhf-status` does, so that it need not know in which processes the jobs are. While a
table is shown, what the jobs print goes to `sweep.log` in the sweep's folder, and to the log of each run as always.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from rlhf.errors import INTERRUPTED, KEYBOARD, DamagedError
from rlhf.files import FAILED, PLAN
from rlhf.sweep.plan import planned_parallelism
from rlhf.sweep.states import RunState, names, progress_line, states
from rlhf.sweep.status import view

SWEEP_LOG = "sweep.log"  # in a sweep's folder: what its jobs have printed under a live table
LIVE_SECONDS = 2.0  # between two looks at the files
PLAIN_SECONDS = 60.0  # between two lines where there is no terminal
SHARE = 0.03  # of the time, at most, that the display looks at files: jobs of Hydra's own launcher share its process
SIGNALS = "rlhf.pipeline.interruption"  # whose log says that a job has noticed a signal (importing it would need torch)
_open: list["Display"] = []


class Display:
    """Shows the runs of a sweep's folder, from a thread of its own, until it is closed."""

    def __init__(self, folder: Path, live: bool):
        self.folder, self.since, self.told = folder, time.time(), set[Path]()
        self.ended = threading.Event()
        self.streams: list[tuple[TextIO, int]] = []  # with a table: streams that are in the log now, and their own file
        self.live: Live | None = None
        if live:
            self.console = Console(file=os.fdopen(os.dup(sys.stdout.fileno()), "w"), force_terminal=True)
            self._redirect()
            # no stream is redirected by rich, as ours lead to the log
            options: dict[str, Any] = {
                "auto_refresh": False,
                "redirect_stdout": False,
                "redirect_stderr": False,
                "transient": True,
            }
            self.live = Live(console=self.console, **options)
            self.live.start()
            self.signals = _Signals(self.console)
            logging.getLogger(SIGNALS).addHandler(self.signals)
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        _open.append(self)

    def close(self) -> None:
        """End the thread, remove the table, and give the streams back."""
        if self not in _open:
            return
        _open.remove(self)
        self.ended.set()
        self.thread.join()
        if self.live:
            with suppress(DamagedError, OSError):
                self._tell(self._runs())
            self.live.stop()
            logging.getLogger(SIGNALS).removeHandler(self.signals)
            for stream, own in self.streams:
                stream.flush()
                os.dup2(own, stream.fileno())
                os.close(own)
            self.console.file.close()

    def _redirect(self) -> None:
        """Send what this process and its children print on the terminal to the log."""
        log = os.open(self.folder / SWEEP_LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (sys.stdout, sys.stderr):
            if stream.isatty():
                stream.flush()
                self.streams.append((stream, os.dup(stream.fileno())))
                os.dup2(log, stream.fileno())
        os.close(log)

    def _watch(self) -> None:
        show: Callable[[list[RunState]], None] = self._show_table if self.live else self._print_line
        pause = LIVE_SECONDS if self.live else PLAIN_SECONDS
        wait = 0.0 if self.live else PLAIN_SECONDS
        while not self.ended.wait(wait):
            started = time.perf_counter()
            with suppress(DamagedError, OSError):  # a file that is being replaced: the next look will find it
                show(self._runs())
            wait = max(pause, (time.perf_counter() - started) / SHARE)

    def _runs(self) -> list[RunState]:
        """The state of all runs; what an earlier start of the sweep left as failed is waiting."""
        return [
            replace(run, state="waiting", reason="") if run.state == "failed" and self._is_old(run.folder) else run
            for run in states(self.folder)
        ]

    def _is_old(self, run: Path) -> bool:
        note = run / FAILED
        return note.exists() and note.stat().st_mtime < self.since - 1

    def _show_table(self, runs: list[RunState]) -> None:
        assert self.live is not None
        self.console.size = os.get_terminal_size(self.console.file.fileno())  # it may change
        self._tell(runs)
        self.live.update(view(self.folder, runs, self.console.height - 2), refresh=True)

    def _tell(self, runs: list[RunState]) -> None:
        """Say at once, above the table, which run has failed, why, and where its log is."""
        called = names(runs)
        for run in (run for run in runs if run.state == "failed" and run.folder not in self.told):
            self.told.add(run.folder)
            self.console.print(Text(f"FAILED {called[run.folder]}: {run.reason}", "red"), soft_wrap=True)
            for log in run.folder.glob("*.log"):
                self.console.print(Text(f"  log: {log}"), soft_wrap=True)

    def _print_line(self, runs: list[RunState]) -> None:
        called = names(runs)
        under_way = [f"{called[run.folder]}: {run.doing}" for run in runs if run.state == "running"]
        print("; ".join([progress_line(runs, planned_parallelism(self.folder / PLAN)), *under_way]), flush=True)


class _Signals(logging.Handler):
    """Shows above the table that a job in this process has noticed Ctrl-C."""

    def __init__(self, console: Console):
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.print(Text(record.getMessage(), "yellow"))


def close() -> None:
    """Close the display, if one is open."""
    for display in _open[:]:
        display.close()


@contextmanager
def closing() -> Iterator[None]:
    """Close the display that is open at the end of the block, however that ends, and say what is to be done then."""
    try:
        yield
    except BaseException as leaving:
        stopped = isinstance(leaving, KeyboardInterrupt) or getattr(leaving, "code", 0) in (INTERRUPTED, KEYBOARD)
        for display in _open[:]:
            display.close()
            if display.live and stopped:  # what the jobs said of it is in the log
                _say_where_it_stands(display.folder)
        raise
    finally:
        close()


def _say_where_it_stands(folder: Path) -> None:
    with suppress(DamagedError, OSError):
        runs = states(folder)
        Console().print(view(folder, runs))
        print(f"stopped: {progress_line(runs, 1).partition(';')[0]}; the same command continues", file=sys.stderr)
        print(f"what the jobs said: {folder / SWEEP_LOG}", file=sys.stderr)
