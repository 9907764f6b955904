"""Reader for the files of offline W&B runs: LevelDB's log format around W&B's own records."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32768, 7
FULL, LAST = 1, 4  # fragment types that end a record


def records(path: Path) -> Iterator[Record]:
    """Blocks of 32 KiB hold fragments: checksum, length, type, content. The first 7 bytes of the file are W&B's own."""
    data, position, content = path.read_bytes(), HEADER, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if left < HEADER or kind == 0:
            position += left
            continue
        content += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(content)
            content = b""
            yield record


@dataclass
class OfflineRun:
    """One run, merged from all its records; `history` are the logged rows, with nested keys joined by dots."""

    folder: Path
    id: str = ""
    name: str = ""
    project: str = ""
    group: str = ""
    stage: str = ""
    tags: list[str] = field(default_factory=list)
    resumed: bool = False
    exit_code: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, str] = field(default_factory=dict)
    alerts: list[tuple[str, str]] = field(default_factory=list)
    made: dict[str, tuple[str, str]] = field(default_factory=dict)  # artefacts: name -> (type, digest)
    used: dict[str, tuple[str, str]] = field(default_factory=dict)

    def values(self, key: str) -> list[tuple[Any, Any]]:
        """(step, value) for each logged value of a metric."""
        return [(row["step"], row[key]) for row in self.history if key in row]

    @property
    def keys(self) -> set[str]:
        return {key for row in self.history for key in row}


def read_run(path: Path) -> OfflineRun:
    run = OfflineRun(path.parent)
    for record in records(path):
        kind = record.WhichOneof("record_type")
        part = getattr(record, kind)
        if kind == "run":
            run.id, run.name, run.project, run.group = part.run_id, part.display_name, part.project, part.run_group
            run.stage, run.tags, run.resumed = part.job_type, list(part.tags), run.resumed or part.resume
            run.config |= _items(part.config.update)
        elif kind == "config":
            run.config |= _items(part.update)
        elif kind == "history":
            run.history.append(_items(part.item))
        elif kind == "summary":
            run.summary |= _items(part.update)
        elif kind == "metric":
            run.axes[part.glob_name or part.name] = part.step_metric
        elif kind == "alert":
            run.alerts.append((part.title, part.text))
        elif kind == "artifact":
            (run.used if part.use_after_commit else run.made)[part.name] = part.type, part.digest
        elif kind == "exit":
            run.exit_code = part.exit_code
    return run


def read_runs(folder: Path) -> list[OfflineRun]:
    """All offline runs below a folder, the oldest first."""
    return [read_run(path) for path in sorted(folder.rglob("offline-run-*/run-*.wandb"), key=lambda path: path.parent)]


def _items(parts: Any) -> dict[str, Any]:
    return {part.key or ".".join(part.nested_key): json.loads(part.value_json) for part in parts}
