"""Several runs in one folder: the present one, and those of other configurations under `earlier/<identity>/`.

A run's folder is named by its overrides. After an edit of the study, the data or the code, a new run therefore belongs
into a folder that may already hold another one. The earlier run moves aside with everything that it has, and the
command with its configuration brings it back.
"""

import logging
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf.errors import DamagedError
from rlhf.files import EARLIER, METRICS, NOTE, SUMMARY, read_json, read_lines, write_json
from rlhf.tracking.reading import renamed_config

log = logging.getLogger(__name__)
STAYS = (
    EARLIER,
    "job.json",
)  # these belong to the folder rather than to a run: earlier runs, and the cluster job under way
UNKNOWN = "unknown"
MOST_TOLD = 3  # differing keys that a description lists
UNVISITED = {"cache", "checkpoints", "wandb", ".hydra"}  # folders without links to models


def identity_of(folder: Path) -> str | None:
    """The identity of the run in a folder: `unknown` if it left no readable note, None if there is no run."""
    if (folder / NOTE).exists():
        note = _readable(folder / NOTE)
        return note if isinstance(note, str) else str((note or {}).get("identity") or UNKNOWN)
    if (folder / SUMMARY).exists():
        return (_readable(folder / SUMMARY) or {}).get("identity") or UNKNOWN
    return UNKNOWN if (folder / METRICS).exists() or any((folder / "checkpoints").glob("*.ckpt")) else None


def read_note(folder: Path) -> dict[str, Any]:
    """What a run noted when it began, or else its summary: `identity`, `config` and, since then, `evaluation`."""
    found = _readable(folder / NOTE) or _readable(folder / SUMMARY)
    return found if isinstance(found, dict) else {}


def place(folder: Path, identity: str) -> Path:
    """Where the run of this identity lies while another one is present."""
    return folder / EARLIER / identity


def note(folder: Path, identity: str, config: Mapping[str, Any], overrides: list[str], **more: Any) -> None:
    """Record whose folder this is, and `more`, such as the `evaluation` by which the run is measured."""
    write_json(folder / NOTE, {"identity": identity, "config": config, "overrides": overrides, **more})


def settle(folder: Path, identity: str, outputs: Path, fresh: bool, described: str) -> None:
    """Make room in `folder` for the run of this identity, and bring it back if it is among the earlier ones.

    `fresh` moves a run of the same identity aside too; `described` is the present run in words, for the log. Nothing is
    deleted. The caller must hold the folder's lock.
    """
    present = identity_of(folder)
    if present is not None and (present != identity or fresh):
        target = set_aside(folder, present, outputs, numbered=present == identity)
        log.warning("%s: %s moves to %s", folder, described, target)
    kept = place(folder, identity)
    if not fresh and kept.is_dir():
        log.info("%s: %s is the present one again", folder, kept)
        if (kept / NOTE).exists():  # first: after a kill half-way the note says whose files these are
            write_json(folder / NOTE, read_json(kept / NOTE))
        _move(kept, folder, outputs)


def set_aside(folder: Path, identity: str, outputs: Path, numbered: bool = False) -> Path:
    """Move the run in `folder` to `earlier/<identity>/`; returns where.

    That is `earlier/<identity>-1/` or higher if the run must not be brought back (`numbered`) or the place is taken.
    """
    number = int(numbered)
    while True:
        target = folder / EARLIER / (f"{identity}-{number}" if number else identity)
        if not (target / NOTE).exists():  # the note is moved last, so a folder without one is this very move, half done
            break
        number += 1
    if not (folder / NOTE).exists():
        write_json(folder / NOTE, identity)
    _move(folder, target, outputs)
    return target


def _move(source: Path, target: Path, outputs: Path) -> None:
    """Move a run's files, the note last, so that a move interrupted half-way is completed at the next start."""
    target.mkdir(parents=True, exist_ok=True)
    linked = [(link, link.resolve()) for link in _links(outputs)]
    entries = [path for path in source.iterdir() if not path.name.startswith(".") and path.suffix != ".log"]
    for path in sorted(entries, key=lambda path: path.name == NOTE):
        if path.name in STAYS:
            continue
        pointed_at = path.resolve()
        if path.is_symlink():
            _link(target / path.name, pointed_at)
            path.unlink()
        else:
            os.replace(path, target / path.name)
            for link in (link for link, model in linked if model == pointed_at):
                _link(link, target / path.name)
    if source.parent.name == EARLIER:
        with suppress(OSError):  # not empty if a writer was killed there
            source.rmdir()
            source.parent.rmdir()


def _links(outputs: Path) -> Iterator[Path]:
    """The symbolic links by which runs share a model (`rlhf.pipeline.cache.take_over`)."""
    for folder, names, _ in os.walk(outputs):
        names[:] = [name for name in names if name not in UNVISITED]
        yield from (path for name in names if (path := Path(folder, name)).is_symlink())


def _link(path: Path, target: Path) -> None:
    """Make `path` a relative link to `target`, atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.symlink_to(os.path.relpath(target.absolute(), path.parent.resolve()), target_is_directory=True)
    os.replace(temporary, path)


def describe(folder: Path, config: Mapping[str, Any], ignored: Collection[str] = ()) -> str:
    """Describe the run in a folder and how its configuration differs from `config`, in a few words.

    Differences in the keys `ignored` (top-level ones, or dotted) do not count.
    """
    lines = read_lines(folder / METRICS)
    step = lines[-1].get("step") if lines else 0
    run = "the finished run" if (folder / SUMMARY).exists() else f"the unfinished run (step {step})"
    found = differences(folder, config, ignored)
    if found is None:
        return f"{run} of an unknown configuration"
    more = f" and {len(found) - MOST_TOLD} more" if len(found) > MOST_TOLD else ""
    return f"{run} with {', '.join(found[:MOST_TOLD])}{more}" if found else f"{run} of other data or other code"


def differences(folder: Path, config: Mapping[str, Any], ignored: Collection[str] = ()) -> list[str] | None:
    """The keys in which a run differs from `config`, such as `ppo.steps=3 instead of 8`; None if they are unknown.

    A key that the run's version did not have is none of them if it does nothing at its value (`identity.OFF`).
    """
    from rlhf.pipeline.identity import decisive  # here, since the command line must start at once

    notes = [_readable(folder / name) for name in (SUMMARY, NOTE)]
    found = [note["config"] for note in notes if isinstance(note, dict) and isinstance(note.get("config"), dict)]
    if not found:
        return None
    past = renamed_config(found[0])
    decided = (decisive({key: node[key] for key in node if key not in ignored}) for node in (past, config))
    before, after = (dict(_flat(node)) for node in decided)
    keys = sorted(
        key for key in before.keys() | after.keys() if key not in ignored and before.get(key) != after.get(key)
    )
    return [f"{key}={before.get(key, 'nothing')} instead of {after.get(key, 'nothing')}" for key in keys]


def _readable(path: Path) -> Any:
    """The object or string in a JSON file; None if the file is absent or damaged."""
    try:
        content = read_json(path) if path.exists() else None
    except DamagedError as error:
        log.warning("%s", error)
        return None
    return content if isinstance(content, dict | str) else None


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node
