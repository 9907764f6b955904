"""The `rlhf` command in a process of its own, which sends itself a signal at a chosen moment.

A moment is a function (`package.module:Class.method`) that is called, or a change to the disk that is about to be made:
`write`, `rename` or `remove`, a blank and a pattern for the path. At the n-th time, some seconds later, a real signal
comes. Nothing else is different from `python -m rlhf`, but that the imports are made already: each process is forked
from one that has done nothing else (multiprocessing's forkserver), or most of a kill's time would go into them.
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
    """The command below `folder`, with the arguments of a `Moment` to die at; what it says goes into `said.log`."""
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
    """Counts, and at the n-th time leaves `died.log` and sends the signal."""

    def __init__(self, where: str, nth: int, seconds: float, number: int):
        self.where, self.left, self.seconds, self.number = where, nth, seconds, number

    def come(self) -> None:
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

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook."""
        verb, _, pattern = self.where.partition(" ")
        if EVENTS.get(event) != verb or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        path = arguments[1] if event == "os.rename" else arguments[0]
        if not isinstance(path, int) and fnmatch(os.fsdecode(path), pattern):
            self.come()

    def watch(self) -> None:
        if " " in self.where:
            sys.addaudithook(self.hear)
            return
        module, _, path = self.where.partition(":")
        owner, _, name = path.rpartition(".")
        holder = pkgutil.resolve_name(f"{module}:{owner}" if owner else module)
        setattr(holder, name, self.wrapped(getattr(holder, name)))

    def wrapped(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.come()
            return function(*args, **kwargs)

        return call
