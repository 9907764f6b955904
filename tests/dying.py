"""`python dying.py WHERE NTH SIGNAL SECONDS ARGUMENT…`: the `rlhf` command, which sends itself a signal at a moment.

WHERE is a function (`package.module:Class.method`) that is called, or a change to the disk that is about to be made:
`write`, `rename` or `remove`, a blank and a pattern for the path. At the NTH time, SECONDS later, a real signal comes;
`died.log` says so. Nothing else is different from `python -m rlhf`.
"""

import functools
import os
import pkgutil
import sys
import threading
from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

EVENTS = {"open": "write", "os.rename": "rename", "os.remove": "remove"}  # Python's audit events


class Moment:
    """Counts, and at the NTH time sends the signal."""

    def __init__(self, where: str, nth: int, number: int, seconds: float):
        self.where, self.left, self.number, self.seconds = where, nth, number, seconds

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


if __name__ == "__main__":
    where, nth, number, seconds, *arguments = sys.argv[1:]
    Moment(where, int(nth), int(number), float(seconds)).watch()
    sys.argv = ["rlhf", *arguments]
    from rlhf.cli import main

    main()
