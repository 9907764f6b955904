"""Helpers of the benchmarks: statistics, memory, subprocesses, a description of the machine, Markdown tables.

Uses the standard library only, because `peer_trl.py` imports it where this project is not installed.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shlex
import shutil
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
TURN = "turn"  # kind of the JSON line that ends a step
T = TypeVar("T")


class Spread(NamedTuple):
    """Median, lower and upper quartile and number of repeated measurements."""

    median: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        digits = 0 if abs(self.median) >= 1000 else 1 if abs(self.median) >= 100 else 2 if abs(self.median) >= 1 else 3
        text = f"{self.median:.{digits}f}"
        return text if self.count == 1 else f"{text} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def spread(values: Iterable[float]) -> Spread:
    """Median and quartiles (`statistics.quantiles`, inclusive); for a single value, that value three times."""
    found = sorted(values)
    if len(found) == 1:
        return Spread(found[0], found[0], found[0], 1)
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
    return Spread(middle, low, high, len(found))


def peak_rss() -> int:
    """Peak resident set size of this process so far, in bytes.

    Read from /proc if possible: `ru_maxrss` survives exec, so it starts at the peak of the parent process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def emit(kind: str, **values: Any) -> None:
    """Print one measurement as a JSON line."""
    print(json.dumps({"kind": kind, **values}), flush=True)


def run_script(python: str | Path, script: str, *arguments: str, threads: int, timeout: float) -> list[dict[str, Any]]:
    """Run a script of this folder in a subprocess and return its measurements; raises what `Turns` raises."""
    with Turns(python, script, *arguments, threads=threads, timeout=timeout) as process:
        return process.finish()


def turn() -> None:
    """In a subprocess of `Turns`: report the end of a step, and block until the parent allows the next."""
    emit(TURN)
    sys.stdin.readline()


class Turns:
    """A script of this folder in a subprocess that blocks after each step (`turn`) until the next one is requested.

    Two such programs can be measured in alternation, step by step, on a machine whose speed changes over minutes.

    Args:
        python: the interpreter.
        script: the name of the script.
        arguments: its arguments.
        threads: OMP and MKL threads of the subprocess.
        timeout: seconds after which it is killed.

    Raises:
        RuntimeError: the script failed or was killed; the message ends with its standard error.
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
        """Run the next step to its end."""
        if not self._read():
            self._fail("ended before this step")

    def finish(self) -> list[dict[str, Any]]:
        """Run the script to its end and return all its measurements."""
        while self._read():
            pass
        if self.process.wait():
            self._fail(f"ended with exit code {self.process.returncode}")
        return self.rows

    def _read(self) -> bool:
        """Collect measurements until the end of the next step; False at the end of the output."""
        assert self.process.stdin
        assert self.process.stdout
        if self.waiting:
            with suppress(BrokenPipeError):  # it was killed while it waited; `_fail` reports that
                self.process.stdin.write("\n")
                self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith('{"kind"'):  # other output is ignored
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
    """Call a function in a subprocess and return its result, so that its peak memory and its GPU memory are separate.

    Args:
        function: a function at the top level of a module.
        arguments: its arguments.
        method: "fork" skips the imports; a function that uses a GPU needs "spawn".
        timeout: seconds after which the subprocess is killed.

    Raises:
        RuntimeError: the function failed (its traceback is on standard error), or took longer than `timeout`.
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


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every script that measures on this machine."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--toy", action="store_true", help="takes seconds; the figures mean nothing")
    parser.add_argument("--write", action="store_true", help="append the tables to RESULTS.md")
    return parser


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table; all columns but the first are right-aligned."""
    head = list(rows[0])
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *([str(row[key]) for key in head] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> str:
    """Processor, usable cores, memory and, if torch is imported, the GPU and torch's version."""
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
    """The commit of this checkout, followed by `+` if tracked files other than RESULTS.md have changed."""
    if shutil.which("git") is None:
        return "unknown"
    command = ["git", "-C", str(HERE), "describe", "--always", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    changes = ["git", "-C", str(HERE), "status", "--porcelain", "-uno", "--", "..", ":!RESULTS.md"]
    changed = subprocess.run(changes, capture_output=True, text=True, check=False).stdout.strip()
    return (done.stdout.strip() or "unknown") + ("+" if changed else "")


def report(title: str, text: str, write: bool) -> None:
    """Print a table with the command, commit and machine that made it; `write` also appends it to RESULTS.md."""
    command = f"python benchmarks/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}".strip()
    made = f"`{command}` at {commit()}, {datetime.now(UTC):%Y-%m-%d}, on {machine()}. Median [quartiles]."
    print(f"\n{title}\n\n{text}\n\n{made}")
    if write:
        with RESULTS.open("a") as file:
            file.write(f"\n## {title}\n\n{made}\n\n{text}\n")
