"""The `rlhf` command in a separate process that sends itself a signal at a chosen moment.

A moment is a call of a function (`package.module:Class.method`) or a change of the disk that is about to happen:
`write`, `rename` or `remove`, a space and a pattern for the path. At its n-th occurrence, plus a delay in seconds, a
real signal is sent. The only other difference from `python -m rlhf` is that imports are already done: each process is
forked from a server that has done nothing else (multiprocessing's forkserver), because imports take most of the time.
"""

import functools
import multiprocessing
import os
import pkgutil
import sys
import threading
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rlhf.cli import main

EVENTS = {"open": "write", "os.rename": "rename", "os.remove": "remove"}  # Python's audit events
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["rlhf.cli", "rlhf.pipeline.run", "rlhf.pipeline.preflight", "rlhf.report.cli", "peft", "hydra._internal.hydra"]
)


def start(folder: Path, arguments: Sequence[str], *moment: Any) -> BaseProcess:
    """Start the command in `folder`; `moment` are arguments of `Moment`. Its output goes to `said.log`."""
    process = FORKS.Process(target=_run, args=(folder, arguments, moment))
    process.start()
    return process


def _run(folder: Path, arguments: Sequence[str], moment: Sequence[Any]) -> None:
    os.chdir(folder)
    said = os.open("said.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    if moment:
        Moment(*moment).watch()
    sys.argv = ["rlhf", *arguments]
    main()


class Moment:
    """Count occurrences; at the n-th, write `died.log` and send signal `number` to this process after `seconds`."""

    def __init__(self, where: str, nth: int, seconds: float, number: int):
        self.where, self.left, self.seconds, self.number = where, nth, seconds, number

    def count(self) -> None:
        self.left -= 1
        if self.left:
            return
        with open("died.log", "a") as file:
            file.write(f"{self.where}\n")
        if self.seconds:
            threading.Timer(self.seconds, self.kill).start()
        else:
            self.kill()

    def kill(self) -> None:
        os.kill(os.getpid(), self.number)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Audit hook: count disk events that match `where`."""
        verb, _, pattern = self.where.partition(" ")
        if EVENTS.get(event) != verb or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        path = arguments[1] if event == "os.rename" else arguments[0]
        if not isinstance(path, int) and fnmatch(os.fsdecode(path), pattern):
            self.count()

    def watch(self) -> None:
        if " " in self.where:
            sys.addaudithook(self.audit)
            return
        module, _, path = self.where.partition(":")
        owner, _, name = path.rpartition(".")
        holder = pkgutil.resolve_name(f"{module}:{owner}" if owner else module)
        setattr(holder, name, self.wrapped(getattr(holder, name)))

    def wrapped(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count()
            return function(*args, **kwargs)

        return call
