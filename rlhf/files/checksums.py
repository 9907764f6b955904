"""Checksums of finished models and simulated comparisons, in `checksums.json`: damage is noticed before use."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf.errors import DamagedError
from rlhf.files import BEST_MODEL, CHECKSUMS, KEPT, LINE_FILES, MODEL, read_object, sync, write_json
from rlhf.files.digests import file_stamp, sha256

Signature = list[int]
# Folders that this process has checked, with the signatures of their files: checksums.json may not be writable.
_sound: dict[Path, dict[str, Signature]] = {}


def seal(folder: Path) -> None:
    """Sync the models in `folder` to disk and write their checksums."""
    files = dict(_files(folder))
    for path in files.values():
        sync(path)
    if files:
        _note(folder, {name: {"sha256": sha256(path), "seen": file_stamp(path)} for name, path in files.items()})


def damage(folder: Path) -> str | None:
    """What is wrong with the models in `folder`, or None. Models of earlier versions without checksums get them.

    A file is only read again if its size, times or inode have changed since it was last found intact: reading 13 GB
    takes most of a minute, and no program changes a file without changing one of these.
    """
    # 1. Nothing changed since this process last looked.
    files = dict(_files(folder))
    seen = {name: file_stamp(path) for name, path in files.items()}
    if _sound.get(folder) == seen:
        return None
    # 2. Compare with the checksums; without any, only a truncated file can be recognised.
    try:
        known = read_object(folder / CHECKSUMS) if (folder / CHECKSUMS).exists() else {}
    except DamagedError as error:
        return str(error)
    cut = filter(None, map(_cut_short, files.values()))
    wrong = next((wrong for _, wrong in _compare(files, seen, known)), None) if known else next(cut, None)
    if wrong:
        return wrong
    # 3. Write the present signatures, so that the files need not be read next time.
    if not known or any(entry["seen"] != seen[name] for name, entry in known.items()):
        known = known or {name: {"sha256": sha256(path)} for name, path in files.items()}
        with suppress(OSError):  # a folder of another user, which can only be read
            _note(folder, {name: {**entry, "seen": seen[name]} for name, entry in known.items()})
    _sound[folder] = seen
    return None


def damaged_below(folder: Path, part: str) -> list[str]:
    """The names of the files in `folder`, below `part`, that differ from their checksums or are gone.

    Raises:
        DamagedError: the checksums cannot be read.
    """
    known = read_object(folder / CHECKSUMS) if (folder / CHECKSUMS).exists() else {}
    files = dict(_files(folder))
    seen = {name: file_stamp(path) for name, path in files.items()}
    chosen = {name: entry for name, entry in known.items() if name.startswith(f"{part}/")}
    return [name for name, _ in _compare(files, seen, chosen)]


def _compare(files: dict[str, Path], seen: dict[str, Signature], known: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, what is wrong) of files that are missing or differ from their checksums.

    `seen` are the present signatures.
    """
    for name, entry in known.items():
        if name not in files:
            yield name, f"{name} is gone"
        elif entry.get("seen") != seen[name] and entry["sha256"] != sha256(files[name]):
            yield name, f"{name} is not what was written, as its checksum shows"


def _note(folder: Path, entries: dict[str, Any]) -> None:
    if entries:
        write_json(folder / CHECKSUMS, entries)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name, path) of the files that other runs read: models, and simulated comparisons."""
    found = [path for model in (MODEL, BEST_MODEL, KEPT) for path in sorted((folder / model).rglob("*"))]
    found += [path for path in sorted(folder.glob("*.jsonl")) if path.name not in LINE_FILES]
    for path in found:
        if path.is_file():
            yield str(path.relative_to(folder)), path


def _cut_short(path: Path) -> str | None:
    """What is wrong with a safetensors file whose size differs from that in its header; None for other files."""
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
