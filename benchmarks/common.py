"""What the benchmarks share and TRL's environment can import too: figures, memory, the machine, Markdown.

Only the standard library: `peer_trl.py` runs where this project is not installed.
"""

import json
import multiprocessing
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "RESULTS.md"
MIB = 2**20
TURN = "turn"
T = TypeVar("T")


class Spread(NamedTuple):
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        digits = 0 if abs(self.median) >= 1000 else 1 if abs(self.median) >= 100 else 2 if abs(self.median) >= 1 else 3
        text = f"{self.median:.{digits}f}"
        return text if self.count == 1 else f"{text} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def spread(values: Iterable[float]) -> Spread:
    """Median and quartiles (inclusive); of one value, that value."""
    found = sorted(values)
    if len(found) == 1:
        return Spread(found[0], found[0], found[0], 1)
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
    return Spread(middle, low, high, len(found))


def peak_rss() -> int:
    """Largest resident set of this process so far, in bytes.

    From /proc where there is one: `ru_maxrss` of a program starts at what the program that started it held.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def emit(kind: str, **values: Any) -> None:
    """One measurement as a JSON line on standard output."""
    print(json.dumps({"kind": kind, **values}), flush=True)


def run_script(python: str | Path, script: str, *arguments: str, threads: int, timeout: float) -> list[dict[str, Any]]:
    """Run a script of this folder in a process of its own; returns its measurements (errors as of `Turns`)."""
    with Turns(python, script, *arguments, threads=threads, timeout=timeout) as process:
        return process.finish()


def turn() -> None:
    """In a process that takes turns with another: say that a step is done, and wait for the word to go on."""
    emit(TURN)
    sys.stdin.readline()


class Turns:
    """A script of this folder in a process of its own that stands still after each step (`turn`) until told to go.

    So two programs can be measured step by step on a machine whose speed changes from minute to minute.

    Raises:
        RuntimeError: it failed, or took longer than `timeout` seconds; with the end of what it wrote to standard error.
    """

    def __init__(self, python: str | Path, script: str, *arguments: str, threads: int, timeout: float):
        environment = {
            **os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
        }  # fmt: skip
        self.command = [str(python), str(HERE / script), *arguments]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by __exit__)
        self.process = subprocess.Popen(
            self.command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors
        )
        self.limit = threading.Timer(timeout, self.process.kill)
        self.limit.start()
        self.rows: list[dict[str, Any]] = []
        self.waiting = False

    def __enter__(self) -> "Turns":
        return self

    def __exit__(self, *_: object) -> None:
        self.limit.cancel()
        self.process.kill()
        self.process.wait()
        self.errors.close()

    def step(self) -> None:
        """Let it come to the end of its next step (the first time: of its first)."""
        if not self._read():
            self._fail("ended before its time")

    def finish(self) -> list[dict[str, Any]]:
        """Let it come to its end, and return all its measurements."""
        while self._read():
            pass
        if self.process.wait():
            self._fail(f"ended with {self.process.returncode}")
        return self.rows

    def _read(self) -> bool:
        """What it says up to its next turn; False if it said no more."""
        assert self.process.stdin
        assert self.process.stdout
        if self.waiting:
            with suppress(BrokenPipeError):  # it was ended while it waited: `_fail` says so
                self.process.stdin.write("\n")
                self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith('{"kind"'):  # whatever else it prints is left out
                row = json.loads(line)
                if row["kind"] == TURN:
                    self.waiting = True
                    return True
                self.rows.append(row)
        return False

    def _fail(self, how: str) -> NoReturn:
        self.process.wait()
        self.errors.seek(0)
        raise RuntimeError(f"{shlex.join(self.command)} {how}:\n{self.errors.read()[-2000:]}")


def isolated(function: Callable[..., T], *arguments: Any, method: str = "fork", timeout: float = 3600.0) -> T:
    """Call a function in a process of its own and return what it returned: its peak memory and its GPU are its own.

    `fork` saves the imports; a process that will use a GPU needs `spawn`.

    Raises:
        RuntimeError: it failed there (standard error says how) or took longer than `timeout` seconds.
    """
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        if receiver.poll(timeout):
            return receiver.recv()
        reason = f"took longer than {timeout:.0f} s"
    except EOFError:
        reason = "failed"
    finally:
        process.join(1)
        process.kill()
        process.join()
    raise RuntimeError(f"{function.__name__}{arguments} {reason}")


def _send(sender: Connection, function: Callable[..., T], arguments: Sequence[Any]) -> None:
    sender.send(function(*arguments))
    sender.close()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same keys as a Markdown table."""
    head = list(rows[0])
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *([str(row[key]) for key in head] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> str:
    """Processor, cores that may be used, memory, and the GPU where torch sees one."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    words = [cpu, f"{cores} cores", f"{memory:.0f} GiB"]
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        words += [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
        words.append(f"torch {torch.__version__}")
    return ", ".join(words)


def commit() -> str:
    """The commit of this checkout, with `+` when it is changed (RESULTS.md itself aside)."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    changes = ["git", "-C", str(HERE), "status", "--porcelain", "-uno", "--", "..", ":!RESULTS.md"]
    changed = subprocess.run(changes, capture_output=True, text=True, check=False).stdout.strip()
    return (done.stdout.strip() or "unknown") + ("+" if changed else "")


def report(title: str, text: str, write: bool) -> None:
    """Print a table, and append it to RESULTS.md with what made it when asked to."""
    command = f"python benchmarks/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}".strip()
    made = f"`{command}` at {commit()}, {datetime.now(UTC):%Y-%m-%d}, on {machine()}. Median [quartiles]."
    print(f"\n{title}\n\n{text}\n\n{made}")
    if write:
        with RESULTS.open("a") as file:
            file.write(f"\n## {title}\n\n{made}\n\n{text}\n")
