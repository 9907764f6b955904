"""Reading and writing the files of runs, atomically, and the names of these files."""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import UnionType
from typing import Any

from rlhf.errors import DamagedError
from rlhf.errors.machine import writing

log = logging.getLogger(__name__)
# In a run's folder:
NOTE = "identity.json"  # a run's identity and configuration, written when it begins
SUMMARY, FAILED, METRICS = "summary.json", "failed.json", "metrics.jsonl"
PLAN = "plan.json"  # in a sweep's folder: its runs, and `jobs`, how many run at once
OUTCOMES, SAMPLES = "outcomes.jsonl", "samples.jsonl"  # results per instruction, and some of the answers
LINE_FILES = (METRICS, OUTCOMES, SAMPLES)  # JSON lines, to which a run appends
SESSIONS = "sessions.json"  # what computed a run, from which step on (`rlhf.tracking.sessions`)
BUDGET = "budget.json"  # the number that ppo.microbatch_tokens=auto was settled to, and for which run
MODEL, BEST_MODEL = "model", "model_best"  # the last policy, and the best one if it is another
ALPACA_EVAL, ALPACA_EVAL_REFERENCE = "alpaca_eval.json", "alpaca_eval_reference.json"  # of the last evaluation
CHECKSUMS = "checksums.json"  # of the models and simulated comparisons, when they were complete
PROGRESS = "progress.json"  # while a stage trains: its `steps`, for displays
RENDERED = "rendered.txt"  # the first row as the model reads it
ADAPTER_CONFIG = "adapter_config.json"  # in a model's folder: peft's, which names the model below the adapter
OUTCOME = (*LINE_FILES, ALPACA_EVAL, ALPACA_EVAL_REFERENCE)  # all results except summary and models
ANSWERS = "answers"  # a folder with the answers that a policy has learnt from (stage=best_of_n, expert_iteration)
KEPT = "kept"  # a folder with the policies of evaluated steps (ppo.keep_evaluated)
EVALUATIONS = "evaluations"  # a folder with evaluations that were made after the training, each in a folder of its own
EARLIER = "earlier"  # a folder with runs of other configurations that had the same name
TORN_SECONDS = 3600  # a temporary file that is older was left by a writer that was killed: no writer takes so long


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Write a file atomically: yields a temporary path, which is synced and renamed to `path` at the end.

    On failure the temporary file is removed. Neither a reader nor a crash of the machine ever leaves half a file.
    Temporary files of killed writers of the same file are removed once they are an hour old: without a lock, and with
    processes on other hosts, a younger one may still be in use.
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
    """Remove the temporary files of killed writers from a folder. The caller must hold the folder's lock."""
    for torn in _torn(folder, ".+"):
        torn.unlink()


def _torn(folder: Path, name: str) -> list[Path]:
    """Temporary files in a folder; `name` is a regular expression for the names of the files that they stand for."""
    return [path for path in folder.glob(".*.*") if re.fullmatch(rf"\.{name}\.\d+", path.name)]


def copy_folder(source: Path, target: Path) -> None:
    """Copy all files of a finished run, the summary last. Permissions are not copied: the source may be read-only."""
    for path in sorted(source.rglob("*"), key=lambda path: path.name == SUMMARY):
        if path.is_file():
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / path.relative_to(source))


def sync(path: Path) -> None:
    """Wait until a file's content is written to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; values that JSON does not know are written as strings."""
    with aside(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=str), encoding="utf-8")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DamagedError: the file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # includes UnicodeDecodeError
        raise DamagedError(f"{path} is damaged: it is not JSON ({error})") from None


def read_object(path: Path, **keys: type | UnionType) -> dict[str, Any]:
    """The content of a JSON file that must be an object with at least the given `keys`, each of the given type.

    Raises:
        DamagedError: the file holds anything else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise DamagedError(f"{path} is damaged: it holds no JSON object")
    for key, kind in keys.items():
        if not isinstance(content.get(key), kind):
            raise DamagedError(f"{path} is damaged: it does not say {key!r}")
    return content


def read_lines(path: Path, *keys: str) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; [] if it does not exist.

    An incomplete last line, as a killed process leaves it, is ignored. Other lines that are not objects with whole
    numbers at all of these `keys` are left out with a warning. Only a line feed ends a line: texts may contain other
    characters at which `str.splitlines` breaks.
    """
    return [content for _, content in _whole_lines(path, keys)]


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines, whole or not at all."""
    with aside(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool], *keys: str) -> None:
    """Rewrite a JSON-lines file atomically with those of the lines of `read_lines` for which `keep` is true."""
    kept = [line for line, content in _whole_lines(path, keys) if keep(content)]
    with aside(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def _whole_lines(path: Path, keys: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(text, content) of every valid line, as `read_lines` describes."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                content = json.loads(line)
            except ValueError:  # after a full disk, or an edit by hand
                log.warning("%s, line %d: not JSON, left out", path, number)
                continue
            missing = next((key for key in keys if not _is_whole(content, key)), None)
            if not isinstance(content, dict) or missing:
                what = f"without a whole number as {missing}" if isinstance(content, dict) else "not an object"
                log.warning("%s, line %d: %s, left out", path, number, what)
                continue
            yield line, content


def _is_whole(content: Any, key: str) -> bool:
    """Whether a line's content is an object with a whole number at `key`."""
    value = content.get(key) if isinstance(content, dict) else None
    return isinstance(value, int) and not isinstance(value, bool)
