"""Files that are there whole or not at all."""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import UnionType
from typing import Any

from rlhf.errors import DamagedError
from rlhf.errors.machine import writing

log = logging.getLogger(__name__)
SUMMARY, FAILED, METRICS = "summary.json", "failed.json", "metrics.jsonl"  # of a run
LINE_FILES = (METRICS, "outcomes.jsonl", "samples.jsonl")  # of a run: a JSON object a line, appended to
BUDGET = "budget.json"  # of a run: what ppo.microbatch_tokens=auto came to, and for which run
MODEL, BEST_MODEL = "model", "model_best"  # of a run: its last policy, and the best where that is another
ALPACA_EVAL, ALPACA_EVAL_REFERENCE = "alpaca_eval.json", "alpaca_eval_reference.json"  # of the last evaluation
ADAPTER_CONFIG = "adapter_config.json"  # in a model's folder: peft's, which names the model below the adapter
EARLIER = "earlier"  # in a run's folder: runs of other configurations that had the same name
TORN_SECONDS = 3600  # no writer is silent for so long: what it wrote aside is left of one that was killed
OUTCOME = (*LINE_FILES, ALPACA_EVAL, ALPACA_EVAL_REFERENCE)  # what a run tells, beside its summary and models


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which is synced to disk and becomes `path` at the end, or vanishes on failure.

    A reader, or a machine that dies, never sees half of it. What writers of the same file left when they were killed
    is removed, an hour later: here nobody may hold a lock, and another host's processes are not known.
    """
    for torn in _torn(path.parent, re.escape(path.name)):
        with suppress(OSError):
            if time.time() - torn.stat().st_mtime > TORN_SECONDS:
                torn.unlink()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with writing(path):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Remove what writers left aside when they were killed; for whoever holds the folder's lock."""
    for torn in _torn(folder, ".+"):
        torn.unlink()


def _torn(folder: Path, name: str) -> list[Path]:
    return [path for path in folder.glob(".*.*") if re.fullmatch(rf"\.{name}\.\d+", path.name)]


def copy_folder(source: Path, target: Path) -> None:
    """Copy what a finished run left, its summary last; not who may write it, as the source may be somebody else's."""
    for path in sorted(source.rglob("*"), key=lambda path: path.name == SUMMARY):
        if path.is_file():
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / path.relative_to(source))


def sync(path: Path) -> None:
    """Wait until the file's content is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, content: Any) -> None:
    """There whole or not at all."""
    with aside(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=str), encoding="utf-8")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DamagedError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the decoder of characters, too
        raise DamagedError(f"{path} is damaged: it is not JSON ({error})") from None


def read_object(path: Path, **keys: type | UnionType) -> dict[str, Any]:
    """The object that a JSON file holds, with at least these keys, each of its type.

    Raises:
        DamagedError: it holds anything else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise DamagedError(f"{path} is damaged: it holds no JSON object")
    for key, kind in keys.items():
        if not isinstance(content.get(key), kind):
            raise DamagedError(f"{path} is damaged: it does not say {key!r}")
    return content


def read_lines(path: Path, *keys: str) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, [] without one; not the torn last line that a killed process leaves.

    A line that is no object with these `keys`, each a whole number, is named and left out. Only "\n" ends a line: texts
    may hold the other characters at which `str.splitlines` breaks.
    """
    return [content for _, content in _whole_lines(path, keys)]


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool], *keys: str) -> None:
    """Rewrite a JSON-lines file, at once, with only the whole lines (see `read_lines`) for which `keep` holds."""
    kept = [line for line, content in _whole_lines(path, keys) if keep(content)]
    with aside(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def _whole_lines(path: Path, keys: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                content = json.loads(line)
            except ValueError:  # a full disk, or another hand
                log.warning("%s, line %d: not JSON, left out", path, number)
                continue
            wanting = next((key for key in keys if not _is_whole(content, key)), None)
            if not isinstance(content, dict) or wanting:
                what = f"without a whole number as {wanting}" if isinstance(content, dict) else "not an object"
                log.warning("%s, line %d: %s, left out", path, number, what)
                continue
            yield line, content


def _is_whole(content: Any, key: str) -> bool:
    value = content.get(key) if isinstance(content, dict) else None
    return isinstance(value, int) and not isinstance(value, bool)
