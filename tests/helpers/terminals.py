"""A command on a pseudo-terminal, and what it shows there."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Seen(NamedTuple):
    """Exit code, and every line that was ever shown, without colours and movements of the cursor."""

    code: int
    lines: list[str]


def on_terminal(
    folder: Path, arguments: Sequence[str], columns: int = 80, keys: Callable[[], bytes] = bytes, seconds: float = 240
) -> Seen:
    """Run `rlhf` in `folder` on a terminal of 30 lines; `keys` is asked again and again what is typed."""
    process, terminal = pty.fork()
    if not process:
        os.chdir(folder)
        os.environ["TERM"] = "xterm-256color"
        os.execv(sys.executable, [sys.executable, "-m", "rlhf", *arguments])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    os.set_blocking(terminal, False)
    said, deadline = b"", time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            part = os.read(terminal, 65536)
        except BlockingIOError:
            time.sleep(0.05)
            os.write(terminal, keys())
            continue
        except OSError:  # the other end is closed
            break
        said += part
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return Seen(code, re.split(r"[\r\n]+", ESCAPES.sub("", said.decode())))
