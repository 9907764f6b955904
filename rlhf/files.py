"""Files that are there whole or not at all."""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
SUMMARY, FAILED, METRICS = "summary.json", "failed.json", "metrics.jsonl"  # of a run
LINE_FILES = (METRICS, "outcomes.jsonl", "samples.jsonl")  # of a run: a JSON object a line, appended to
BUDGET = "budget.json"  # of a run: what ppo.microbatch_tokens=auto came to, and for which run
MODEL, BEST_MODEL = "model", "model_best"  # of a run: its last policy, and the best where that is another
ALPACA_EVAL, ALPACA_EVAL_REFERENCE = "alpaca_eval.json", "alpaca_eval_reference.json"  # of the last evaluation
OUTCOME = (*LINE_FILES, ALPACA_EVAL, ALPACA_EVAL_REFERENCE)  # what a run tells, beside its summary and models


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which is synced to disk and becomes `path` at the end, or vanishes on failure.

    A reader, or a machine that dies, never sees half of it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Remove what writers left aside when they were killed; for whoever holds the folder's lock."""
    for torn in folder.glob(".*.*"):
        if re.fullmatch(r"\..+\.\d+", torn.name):
            torn.unlink()


def sync(path: Path) -> None:
    """Wait until the file's content is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, content: Any) -> None:
    """There whole or not at all."""
    with aside(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=str), encoding="utf-8")


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, [] without one; not the torn last line that a killed process leaves.

    Only "\n" ends a line: texts may hold the other characters at which `str.splitlines` breaks.
    """
    return [content for _, content in _whole_lines(path)]


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a JSON-lines file, at once, with only the whole lines for which `keep` holds."""
    kept = [line for line, content in _whole_lines(path) if keep(content)]
    with aside(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def _whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.exists():
        return
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                yield line, json.loads(line)
            except json.JSONDecodeError:  # a full disk, or another hand
                log.warning("%s, line %d: not JSON, left out", path, number)
