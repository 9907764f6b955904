"""Turn rows into records so that every row read is either kept or reported: file, row and reason.

A generator judges the rows one by one, and `datasets` caches its verdicts, those on the bad rows too: the report is
there whether the rows were read now or came from the cache. Its key holds the files' contents, the arguments and the
code that judges.
"""

import errno
import hashlib
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

import datasets
from datasets import Dataset, Features, NamedSplit, Value
from datasets.exceptions import DatasetGenerationError

from rlhf.data.records import Split, columns
from rlhf.data.sources import Source
from rlhf.errors import DataError, RowError

log = logging.getLogger(__name__)

OnBadRow = Literal["skip", "fail"]
ToRecord = Callable[[Mapping[str, Any]], Any]
REASON = "_reason"
"""The column that says why a row cannot be used: empty for the others."""
BATCH = 200
"""Rows that are in memory when they are written, and when they are read again."""
MAX_TEXT = 1_000_000
"""Longest text of a row in characters: a longer one is a broken file and would exhaust a tokenizer's memory."""


def text(row: Mapping[str, Any], name: str, *, optional: bool = False) -> str:
    """The text in a row's field, without surrounding whitespace (which belongs to the template); "" if optional.

    An indentation goes from all lines or from none: code whose first line alone lost it would be broken.

    Raises:
        RowError: the field is missing, is no text, or is empty, endless or not encodable.
    """
    value = row.get(name)
    if value is None and optional:
        return ""
    if value is None:
        raise RowError(f"no `{name}`")
    if not isinstance(value, str):
        raise RowError(f"`{name}` is of type {type(value).__name__}, not text")
    if len(value) > MAX_TEXT:
        raise RowError(f"`{name}` is longer than {MAX_TEXT:,} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(f"`{name}` holds half a character (a lone surrogate)") from None
    if not value.strip() and not optional:
        raise RowError(f"empty `{name}`")
    return _without_margin(value)


def _without_margin(value: str) -> str:
    """The text without blank lines at its ends and without the indentation that all of its lines have.

    A single space before the first line is none: it is what separated a prompt from its answer.
    """
    start = value.rfind("\n", 0, len(value) - len(value.lstrip())) + 1
    lines = value[start:].rstrip().split("\n")
    indents = [line[: len(line) - len(line.lstrip())] for line in lines if line.strip()]
    margin = next((i for i, column in enumerate(zip(*indents, strict=False)) if len(set(column)) > 1), None)
    margin = min(map(len, indents), default=0) if margin is None else margin
    first, *rest = [line[margin:] if line.strip() else line for line in lines]
    return "\n".join([first[1:] if first[:1].isspace() and first[0] != "\t" and first[1:2].strip() else first, *rest])


@dataclass(frozen=True)
class BadRows:
    """What became of the rows of a split: how many were read, by file, and which were skipped, by file and reason."""

    read: dict[str, int]
    skipped: dict[tuple[str, str], list[int]]

    @property
    def counts(self) -> dict[str, int]:
        """Skipped rows by reason, the most frequent first: what a run's summary lists."""
        counts: Counter[str] = Counter()
        for (_, reason), rows in self.skipped.items():
            counts[reason] += len(rows)
        return dict(counts.most_common())

    @property
    def kept(self) -> int:
        """Rows that became records."""
        return sum(self.read.values()) - sum(self.counts.values())

    def lines(self) -> list[str]:
        """A line for each file and reason, with the first row numbers."""
        lines = []
        for (file, reason), rows in self.skipped.items():
            first = ", ".join(f"{row:,}" for row in rows[:3])
            some = f"row{'s' * (len(rows) > 1)} {first}{', …' * (len(rows) > 3)}"
            lines.append(f"{file}: {len(rows):,} of {self.read[file]:,} rows skipped: {reason} ({some})")
        return lines


@dataclass(frozen=True)
class _Job:
    """All that determines the verdicts: hashed into the cache key."""

    sources: tuple[Source, ...]
    to_record: ToRecord
    columns: tuple[str, ...]
    deduplicate: bool
    stamps: tuple[str, ...]


def read_records(
    sources: tuple[Source, ...],
    to_record: ToRecord,
    split: str,
    *,
    on_bad_row: OnBadRow = "skip",
    deduplicate: bool = True,
    record: type | None = None,
) -> tuple[Dataset, BadRows]:
    """Read `split` from `sources` and log what is skipped.

    With a `record` (a dataclass of strings) `split` is only a name: the data set divides these rows into splits itself.

    `to_record` makes a row's record or raises `RowError`. Its pickle is part of the cache key: a frozenset in it, whose
    order differs between processes, would defeat the cache.

    Raises:
        DataError: a source cannot be read, the split has not a single good row or, if `on_bad_row` is `fail`, any bad
            one (duplicates included).
    """
    stamps = (*(source.fingerprint() for source in sources), code_digest(to_record.__module__))
    names = [field.name for field in fields(record)] if record else columns(cast(Split, split))
    job = _Job(sources, to_record, tuple(names), deduplicate, stamps)
    features = {name: Value("string") for name in (*job.columns, "_file", REASON)} | {"_row": Value("int64")}
    verdicts = generated(_judge, job, Features(features), split)
    report, kept = _report(verdicts)
    if on_bad_row == "fail" and report.skipped:
        (file, reason), rows = next(iter(report.skipped.items()))
        raise DataError(f"{split}: {file}, row {rows[0]:,}: {reason} (`on_bad_row: skip` skips and counts such rows).")
    if not kept:
        reasons = ", ".join(f"{count:,} × {reason}" for reason, count in report.counts.items())
        raise DataError(f"{split}: no row of {', '.join(report.read)} can be used ({reasons}).")
    for line in report.lines():
        log.warning("%s: %s", split, line)
    return verdicts.select(kept).select_columns(list(job.columns)), report


def generated(generator: Callable[[Any], Iterator[dict[str, Any]]], job: Any, features: Features, name: str) -> Dataset:
    """The rows that `generator(job=job)` yields, written to the cache of `datasets`, or found there under `job`.

    Raises:
        DataError: the generator did, or the cache cannot be read.
    """
    try:
        return Dataset.from_generator(
            generator, features=features, gen_kwargs={"job": job}, split=NamedSplit(name), writer_batch_size=BATCH
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise
    except (AttributeError, OSError, ValueError) as error:  # Arrow's errors are of the latter two kinds
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        folder, reason = Path(datasets.config.HF_DATASETS_CACHE, "generator"), next(iter(str(error).splitlines()), "")
        raise DataError(
            f"{name}: the rows cannot be read from the cache of `datasets` ({type(error).__name__}: {reason}): delete "
            f"{folder}, which holds only copies of rows, and they are read from their sources again."
        ) from error


def code_digest(module: str = __name__) -> str:
    """Of this package and of `module`: a new version must not be given an old one's verdicts."""
    files = {
        *Path(__file__).parent.glob("*.py"),
        Path(getattr(sys.modules[module], "__file__", None) or __file__),
    }
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()


def _judge(job: _Job) -> Iterator[dict[str, Any]]:
    """Each row read: a record and no reason, or no record and the reason."""
    nothing = dict.fromkeys(job.columns, "")
    seen: set[bytes] | None = set() if job.deduplicate else None
    for source in job.sources:
        for number, row in source.rows():
            try:
                record, reason = _to_columns(row, job.to_record, seen), ""
            except RowError as bad:
                record, reason = nothing, str(bad)
            yield {**record, "_file": source.name, "_row": number, REASON: reason}


def _to_columns(row: Any, to_record: ToRecord, seen: set[bytes] | None) -> dict[str, str]:
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, Mapping):
        raise RowError("not a JSON object")
    record = asdict(to_record(row))
    if seen is not None:
        digest = hashlib.sha256(repr(record).encode()).digest()
        if digest in seen:
            raise RowError("duplicate of an earlier row")
        seen.add(digest)
    return record


def _report(verdicts: Dataset) -> tuple[BadRows, list[int]]:
    """The report, and the indices of the rows to keep."""
    columns = verdicts.select_columns(["_file", "_row", REASON])[:]
    skipped: dict[tuple[str, str], list[int]] = {}
    kept = []
    for index, (file, row, reason) in enumerate(zip(columns["_file"], columns["_row"], columns[REASON], strict=True)):
        if reason:
            skipped.setdefault((file, reason), []).append(row)
        else:
            kept.append(index)
    return BadRows(dict(Counter(columns["_file"])), skipped), kept
