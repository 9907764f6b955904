"""Run parts of a measurement in processes of their own, within a budget of seconds, and write results as they come.

The parent imports everything once and forks. It must not touch CUDA, which does not survive a fork; importing
bitsandbytes touches it, so that only the children do.
"""

import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

END = "end"  # kind of the line that ends an item
SHOWN = 240  # characters of a line on the terminal; the results file has all of it


@dataclass(frozen=True)
class Bench:
    """What an item is given.

    Attributes:
        results: file of JSON lines.
        device: "cuda" or "cpu".
        toy: use sizes that take seconds on a CPU.
        ends: when the process is killed, by `time.monotonic`.
        part: the part that runs.
        item: the item that runs.
    """

    results: Path
    device: str
    toy: bool
    ends: float
    part: str = ""
    item: str = ""

    @property
    def left(self) -> float:
        """Seconds until the process is killed."""
        return self.ends - time.monotonic()

    def say(self, kind: str, **values: Any) -> None:
        """Append a line to the results, and print its beginning with rounded numbers."""
        line = json.dumps({"part": self.part, "item": self.item, "kind": kind, **values})
        with self.results.open("a", encoding="utf-8") as file:
            file.write("\n" + line)  # the newline first: it also ends a line that a killed process left
        print(f"{self.part} {self.item} {kind} {json.dumps(rounded(values))}"[:SHOWN], flush=True)


def rounded(x: Any) -> Any:
    """The same nested values with three significant digits."""
    if isinstance(x, float):
        return float(f"{x:.3g}")
    if isinstance(x, Mapping):
        return {key: rounded(value) for key, value in x.items()}
    return [rounded(value) for value in x] if isinstance(x, list | tuple) else x


Item = Callable[[Bench], Mapping[str, Any] | None]


@dataclass(frozen=True)
class Part:
    """A measurement in several items, which run in order in one process until one fails.

    Attributes:
        items: functions by name. What an item returns stands in the line that ends it.
        needs: seconds; the part is not begun with less.
        limit: seconds after which it is cut off.
    """

    items: Mapping[str, Item]
    needs: float
    limit: float

    def only(self, word: str) -> "Part":
        """The items whose name contains `word`."""
        return replace(self, items={name: item for name, item in self.items.items() if word in name})


def read(results: Path) -> list[dict[str, Any]]:
    """The lines of a results file, without one that was being written when its process died; [] if there is no file."""
    lines = []
    for line in results.read_text(encoding="utf-8").splitlines() if results.exists() else []:
        with suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def missing(results: Path, name: str, part: Part) -> list[str]:
    """The items of a part that have not ended yet."""
    ended = {line["item"] for line in read(results) if line["kind"] == END and line["part"] == name}
    return [item for item in part.items if item not in ended]


def run_parts(parts: Iterable[tuple[str, Part]], bench: Bench, method: str) -> None:
    """Run what is missing of each part, in order, until `bench.ends`."""
    for name, part in parts:
        own = replace(bench, part=name, ends=min(bench.ends, time.monotonic() + part.limit))
        if not missing(bench.results, name, part):
            own.say("skipped", why="every item has ended")
        elif own.left < part.needs:
            own.say("skipped", why=f"needs {part.needs:.0f} s, and {own.left:.0f} s are left")
        else:
            run_part(part, own, method)


def run_part(part: Part, bench: Bench, method: str) -> None:
    """Run what is missing of a part, each process until its first failure: it may have broken the device for the rest.

    An item whose process died is given up. An item that is cut off leaves the lines it has written.
    """
    while names := missing(bench.results, bench.part, part):
        code = run_process(part, bench, method, names)
        if code is None:
            bench.say("cut off", items=missing(bench.results, bench.part, part))
            return
        if missing(bench.results, bench.part, part) == names:
            replace(bench, item=names[0]).say(END, ok=False, error=f"the process died: exit code {code}")


def run_process(part: Part, bench: Bench, method: str, names: Sequence[str]) -> int | None:
    """Run items in a process until `bench.ends`; its exit code, None if it had to be killed."""
    process = multiprocessing.get_context(method).Process(target=run_items, args=(part, bench, names))
    process.start()
    process.join(max(bench.left, 0.0))
    if not process.is_alive():
        return process.exitcode
    process.kill()
    process.join()
    return None


def working_method(part: Part, bench: Bench) -> str:
    """Run all of a part, forked if CUDA works in a fork of this process, and spawned otherwise; which it was."""
    own = replace(bench, ends=min(bench.ends, time.monotonic() + part.limit))
    run_process(part, own, "fork", list(part.items))
    if read(bench.results)[-1].get("ok"):
        return "fork"
    run_process(
        part, replace(bench, ends=min(bench.ends, time.monotonic() + 2 * part.limit)), "spawn", list(part.items)
    )
    return "spawn"


def run_items(part: Part, bench: Bench, names: Sequence[str]) -> None:
    """Run items one after another, up to the first that raises. This is what a process does."""
    show_bitsandbytes()
    for name in names:
        own, started = replace(bench, item=name), time.monotonic()
        try:
            found, failed = part.items[name](own) or {}, False
        except Exception as error:
            failed = True
            where = [f"{Path(f.filename).name}:{f.lineno} {f.line}" for f in traceback.extract_tb(error.__traceback__)]
            found = {"ok": False, "error": f"{type(error).__name__}: {error}"[:600], "where": where[-4:]}
        own.say(END, **{"ok": True, **found}, seconds=round(time.monotonic() - started, 2))
        if failed:
            break
    sys.stdout.flush()
    os._exit(0)  # not by way of exit handlers, which may wait for a device that no longer answers


@contextmanager
def hidden_bitsandbytes() -> Iterator[None]:
    """Import the libraries inside this block as if bitsandbytes were not installed; `show_bitsandbytes` undoes it."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # so that torch.cuda.is_available() touches no device either
    sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]
    yield


def show_bitsandbytes() -> None:
    """Let libraries find bitsandbytes again: they remember that it was not there."""
    if sys.modules.get("bitsandbytes", ...) is not None:
        return
    del sys.modules["bitsandbytes"]
    for module in ("peft.import_utils", "transformers.utils.import_utils", "accelerate.utils.imports"):
        for function in vars(sys.modules.get(module, sys)).values():
            if hasattr(function, "cache_clear") and ("bnb" in function.__name__ or "bitsandbytes" in function.__name__):
                function.cache_clear()
