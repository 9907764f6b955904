"""Checksums of finished models, `checksums.json` beside `model/`: nobody computes with a damaged one unawares."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf.errors import DamagedError
from rlhf.files import BEST_MODEL, LINE_FILES, MODEL, read_object, sync, write_json
from rlhf.files.digests import file_stamp, sha256

CHECKSUMS = "checksums.json"
Signature = list[int]
_sound: dict[Path, dict[str, Signature]] = {}  # what this process has found sound, where no note can be left


def seal(folder: Path) -> None:
    """Note the checksums of the models in `folder`, once they are on the disk."""
    files = dict(_files(folder))
    for path in files.values():
        sync(path)
    if files:
        _note(folder, {name: {"sha256": sha256(path), "seen": file_stamp(path)} for name, path in files.items()})


def damage(folder: Path) -> str | None:
    """What is wrong with the models in `folder`, or None; what an earlier version left without checksums gets them.

    A file is read again only where its size, times or inode are not those of when it was last found sound: reading
    13 GB takes most of a minute, and no program changes a file without changing one of these.
    """
    files = dict(_files(folder))
    seen = {name: file_stamp(path) for name, path in files.items()}
    if _sound.get(folder) == seen:
        return None
    try:
        known = read_object(folder / CHECKSUMS) if (folder / CHECKSUMS).exists() else {}
    except DamagedError as error:
        return str(error)
    wrong = _compare(files, seen, known) if known else next(filter(None, map(_cut_short, files.values())), None)
    if wrong:
        return wrong
    if not known or any(entry["seen"] != seen[name] for name, entry in known.items()):
        known = known or {name: {"sha256": sha256(path)} for name, path in files.items()}
        with suppress(OSError):  # somebody else's, who lets us read
            _note(folder, {name: {**entry, "seen": seen[name]} for name, entry in known.items()})
    _sound[folder] = seen
    return None


def _compare(files: dict[str, Path], seen: dict[str, Signature], known: dict[str, Any]) -> str | None:
    for name, entry in known.items():
        if name not in files:
            return f"{name} is gone"
        if entry.get("seen") != seen[name] and entry["sha256"] != sha256(files[name]):
            return f"{name} is not what was written, as its checksum shows"
    return None


def _note(folder: Path, entries: dict[str, Any]) -> None:
    if entries:
        write_json(folder / CHECKSUMS, entries)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """What other runs read: models, and simulated comparisons."""
    found = [path for model in (MODEL, BEST_MODEL) for path in sorted((folder / model).rglob("*"))]
    found += [path for path in sorted(folder.glob("*.jsonl")) if path.name not in LINE_FILES]
    for path in found:
        if path.is_file():
            yield str(path.relative_to(folder)), path


def _cut_short(path: Path) -> str | None:
    """Whether weights end before, or after, what their header says: all that shows without a checksum."""
    if path.suffix != ".safetensors":
        return None
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < path.stat().st_size else {}
        ends = [part["data_offsets"][1] for name, part in header.items() if name != "__metadata__"]
        whole = path.stat().st_size == 8 + length + max(ends)
    except (AttributeError, KeyError, TypeError, ValueError):
        whole = False
    return None if whole else f"{path.name} is cut short or overwritten"
